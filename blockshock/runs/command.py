"""How a command ends: in 0, or in one line on stderr and the code that says why."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockshock.runs.settings import Refused


def answer(program: str, act: Callable[[Callable[[str], Any]], None]) -> int:
    """Runs a command; returns its exit code: 0, or 1 after one line that says what is wrong.

    act: takes `join(device)`, which gives the `ranks.Ranks` that this process belongs to, and is
    called once at most. It imports torch, so that Ctrl-C is one line from the start.
    """
    ranks, code = None, 0

    def join(device: str) -> Any:
        nonlocal ranks
        from blockshock.runs import ranks as processes

        ranks = processes.join(device)
        return ranks

    def say(text: str) -> None:
        rank = f" rank {ranks.rank}:" if ranks and ranks.size > 1 else ""
        print(f"{program}:{rank} {text}", file=sys.stderr, flush=True)

    try:
        act(join)
    except Refused as error:
        say(str(error))
        code = 1
    except KeyboardInterrupt:  # training ends by itself; the rest is made again
        say("interrupted")
        return 130
    if ranks:
        ranks.leave()
    return code


def check_options(options: Namespace, *of_train: str) -> None:
    """Raises Refused for options that only training reads, where nothing is trained."""
    given = [name for name in of_train if getattr(options, name)]
    if given and options.command not in (None, "train"):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise Refused(f"{options.command} {names}: only train reads it; leave it out")


def is_trained(
    config: Any, options: Namespace, load: Callable[[Path], dict], tell: Callable[[str], None]
) -> bool:
    """Whether nothing is left to train, and tells so; asked only where all is to be done.

    load: gives a checkpoint's state, of a file.
    """
    from blockshock.runs.checkpoint import NAME  # torch is not imported before `act`

    file = Path(config.run) / NAME
    if options.command or options.init_from or not file.exists():
        return False
    done = load(file)["step"]
    if done < config.train.steps:
        return False
    tell(f"trained already: {done} steps")
    return True
