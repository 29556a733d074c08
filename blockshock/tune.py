"""Measures beforehand what "auto" would measure at the first use of a size.

    python -m blockshock.tune --ranks 2 --N 4096,8192 --B 64,1024,4096 [--method M,M] [--mask M,M]

For every N = K and B each method is built with reduce="auto" (and kernel="auto"), and its forward
and its backward run once, with weights that train. What was fastest is kept for this GPU, driver
and libraries (`blockshock.tuning`), where every later use of the size finds it.
"""

import argparse
import logging
import sys

import torch

from blockshock import cache, masks, sources, tuning
from blockshock.distributed import note, open_ranks
from blockshock.linear import METHODS, ways

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TUNED = [name for name, method in METHODS.items() if "auto" in getattr(method, "reduces", ())]


def measure(method: str, mask: str | None, N: int, B: int, dtype: str) -> dict[str, dict]:
    """What is fastest for one layer: `ways.answers`. Called in every rank of the default group."""
    logging.getLogger("blockshock.tuning").setLevel(logging.ERROR)  # the command tells it all
    tuning.exact_sizes()
    note(f"measuring {method} at N = {N}, B = {B}")
    like = {"dtype": DTYPES[dtype], "device": torch.device("cuda", torch.cuda.current_device())}
    options = {"mask": mask} if mask else {}
    weight = sources.SeededWeight(N, N, seed=0, **like)
    layer = METHODS[method].from_dense(weight, reduce="auto", **options)
    x = torch.randn(B, N, **like).requires_grad_()
    y = layer(x)
    y.backward(torch.randn_like(y))
    return ways.answers(layer, B)


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m blockshock.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="GPUs that share a layer (default 2)")
    add("--N", type=_numbers, default=[4096, 8192, 16384], metavar="N[,N]", help="sides of W")
    add("--B", type=_numbers, default=[16, 64, 1024, 4096], metavar="B[,B]", help="rows of x")
    add("--dtype", type=_known(DTYPES), default=["bf16"], metavar="D[,D]", help="bf16, fp16")
    default = ["dense_tp_row", "block_shock"]
    add("--method", type=_known(TUNED), default=default, metavar="M[,M]", help=", ".join(TUNED))
    add("--mask", type=_known(masks.PATTERNS), default=["tile", "1100"], metavar="M[,M]")
    options = parser.parse_args(argv)
    count = torch.cuda.device_count()
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: at least one GPU is needed")
    if count < options.ranks:
        parser.error(f"--ranks {options.ranks}: a GPU for each rank is needed, found {count}")
    wanted = [
        (method, mask, N, B, dtype)
        for dtype in options.dtype
        for N in options.N
        for B in options.B
        for method in options.method
        for mask in [m for m in options.mask if m in METHODS[method].masks] or [None]
    ]
    for method, mask, N, _, dtype in wanted:
        sizes = {"dtype": DTYPES[dtype], "device_type": "cuda", "ranks": options.ranks}
        reason = METHODS[method].unsupported(N, N, mask=mask, **sizes)
        if reason:
            parser.error(f"{method} at N = {N}: {reason}")
    with open_ranks(options.ranks, "cuda") as ranks:
        for layer in wanted:
            for answer in ranks.run(measure, *layer, timeout=600)[0].values():
                if answer["seconds"]:  # there was something to choose from
                    print(line(answer), flush=True)
    print(f"kept in {cache.folder()}")
    return 0


def line(answer: dict) -> str:
    """What was asked, what was fastest, and how far behind the next three are."""
    best, *others = sorted(answer["seconds"].items(), key=lambda item: item[1])
    beside = ", ".join(f"{name} {seconds / best[1]:.2f}x" for name, seconds in others[:3])
    took = f" (measured in {answer['took']:.1f} s)" if answer["took"] else f" ({answer['source']})"
    told = f"{answer['question']}: {answer['way']} {best[1] * 1e3:.4f} ms"
    return told + (f"; {beside}" if beside else "") + took


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are whole numbers from 1 on")
    return [int(word) for word in words]


def _known(valid):
    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in valid:
                raise argparse.ArgumentTypeError(f"{name!r}: use {', '.join(valid)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
