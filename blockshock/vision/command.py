"""Trains a vision transformer that learns which tiles of its weights to keep, evaluates it with
these tiles alone, and times it; all three if none is named.

python -m blockshock.block_sparse --config digits
torchrun --nproc-per-node 8 -m blockshock.block_sparse --config imagenet --set data.source=PATH
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from blockshock.runs.command import answer, check_options, is_trained
from blockshock.runs.settings import Refused
from blockshock.vision import config as settings
from blockshock.vision.config import CONFIGS, Config

COMMANDS = ("train", "evaluate", "benchmark")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 after one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    return answer("blockshock.block_sparse", partial(_command, options))


def _command(options: argparse.Namespace, join: Callable) -> None:
    if find_spec("tqdm") is None:
        raise Refused("tqdm not installed; pip install 'blockshock[vision]'")
    check_options(options, "resume", "init_from")
    config = settings.load(options.config, options.set)
    ranks = join(config.device)
    _run(config, ranks, options)


def _run(config: Config, ranks, options: argparse.Namespace) -> None:
    from blockshock.vision.checkpoint import load
    from blockshock.vision.data import open_source
    from blockshock.vision.evaluate import evaluate
    from blockshock.vision.model import vision_config
    from blockshock.vision.storage import check
    from blockshock.vision.train import train

    def tell(line: str) -> None:
        if ranks.first:
            print(line, flush=True)

    wanted = [options.command] if options.command else COMMANDS
    vision_config(config)  # refuses before anything is made
    if "evaluate" in wanted:
        check(config)
    source = open_source(config) if set(wanted) & {"train", "evaluate"} else None
    if "train" in wanted and not is_trained(config, options, load, tell):
        given = {"resume": options.resume, "init_from": options.init_from}
        if not train(config, source, ranks, tell, **given):
            return
    if "evaluate" in wanted:
        evaluate(config, source, ranks, tell)
    if "benchmark" in wanted:
        _benchmark(config, ranks, options, tell)


def _benchmark(config: Config, ranks, options: argparse.Namespace, tell: Callable) -> None:
    from blockshock.vision.benchmark import benchmark

    if ranks.size > 1 and options.command:
        raise Refused(f"benchmark on {ranks.size} ranks: it times one device; start it alone")
    if ranks.first:
        benchmark(config, ranks.device, tell)
    ranks.wait("the benchmark")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m blockshock.block_sparse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    add("command", nargs="?", choices=COMMANDS, help="without it: all, training only once")
    add("--config", default="digits", metavar="C", help=f"a .yaml file, or one of {names}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sparse.linear=0.9")
    add("--resume", action="store_true", help="go on from the run's checkpoint")
    add("--init-from", metavar="PATH", help="begin with the weights of a checkpoint")
    return parser
