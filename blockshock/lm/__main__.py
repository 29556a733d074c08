"""Trains a language model from text: prepare, train, evaluate, sample; all four if none is named.

python -m blockshock.lm --config small
torchrun --nproc-per-node 2 -m blockshock.lm train --config gpt2_124m --set run=runs/first
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from blockshock.lm import config as settings
from blockshock.lm.config import CONFIGS, Config, Refused
from blockshock.runs.command import answer, check_options, is_trained

COMMANDS = ("prepare", "train", "evaluate", "sample")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 after one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    return answer("blockshock.lm", partial(_command, options))


def _command(options: argparse.Namespace, join: Callable) -> None:
    lacks = [name for name in ("tokenizers", "tqdm") if find_spec(name) is None]
    if lacks:
        raise Refused(f"{', '.join(lacks)} not installed; pip install 'blockshock[lm]'")
    check_options(options, "resume", "init_from", "skip_data")
    config = settings.load(options.config, [*_short_forms(options), *options.set])
    ranks = join(config.device)
    if options.command != "prepare":  # which one process can do for any number of ranks
        ranks = ranks.split(config.model.tensor_parallel)
    _run(config, ranks, options)


def _short_forms(options: argparse.Namespace) -> list[str]:
    return [] if options.sync is None else [f"model.sync={json.dumps(options.sync)}"]


def _run(config: Config, ranks, options: argparse.Namespace) -> None:
    from blockshock.lm.checkpoint import load
    from blockshock.lm.model import decoder_config, trained
    from blockshock.lm.prepare import open_prepared, prepare
    from blockshock.lm.train import train

    def tell(line: str) -> None:
        if ranks.first:
            print(line, flush=True)

    wanted = [options.command] if options.command else COMMANDS
    decoder_config(config)  # refuses before anything is made
    if "prepare" in wanted:
        if ranks.first:
            prepare(config.data, tell)
        ranks.wait("preparing the tokens")
    if wanted == ["prepare"]:
        return
    data = open_prepared(config.data)
    if "train" in wanted and not is_trained(config, options, load, tell):
        done = train(
            config,
            data,
            ranks,
            tell,
            resume=options.resume,
            init_from=options.init_from,
            skip_data=options.skip_data,
        )
        if not done:
            return
    if "evaluate" in wanted:
        model, step = trained(config, data, ranks)
        _evaluate(model, step, config, data, ranks, tell)
    if "sample" in wanted and ranks.data_rank == 0:
        _sample(trained(config, data, ranks)[0], config, data, ranks, tell)
    ranks.wait("the sample")


def _evaluate(model, step: int, config: Config, data, ranks, tell: Callable) -> None:
    """The loss over all validation tokens, shown and written to `<run>/evaluation.json`."""
    from blockshock.lm.model import mean_loss
    from blockshock.runs.files import written_whole

    found = mean_loss(model, data.validation, config, ranks)
    found = {"step": step, **found, "perplexity": math.exp(min(found["loss"], 700.0))}
    tell(
        f"validation after step {step}: loss {found['loss']:.4f}, perplexity "
        f"{found['perplexity']:.2f}, over {found['tokens']} tokens"
    )
    if ranks.first:
        with written_whole(Path(config.run) / "evaluation.json") as out:
            out.write(json.dumps(found, indent=1).encode())


def _sample(model, config: Config, data, ranks, tell: Callable) -> None:
    """Text, shown and written to `<run>/sample.txt`; made by all ranks that hold the model."""
    from blockshock.lm.sample import sample
    from blockshock.runs.files import written_whole

    text = sample(model, data, config.sample)
    tell(text)
    if ranks.first:
        with written_whole(Path(config.run) / "sample.txt") as out:
            out.write(text.encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m blockshock.lm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    add("command", nargs="?", choices=COMMANDS, help="without it: all, skipping what is done")
    add("--config", default="small", metavar="C", help=f"a .yaml file, or one of {names}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.lr=3e-4")
    add("--sync", metavar="PLAN", help="sets model.sync: tp, spd12, 6, desync:6, …")
    add("--resume", action="store_true", help="go on from the run's checkpoint")
    add("--init-from", metavar="PATH", help="begin with the weights of a checkpoint")
    add("--skip-data", type=_count, default=0, metavar="N", help="leave out N sequences of data")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of sequences is needed")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
