"""Measures beforehand what "auto" would measure at the first use of a size.

    python -m blockshock.tune --ranks 2 --N 4096,8192 --B 64,1024,4096 [--method M,M] [--mask M,M]

For every N = K and B each method is built with reduce="auto" (and kernel="auto"), and its forward
and its backward run once, with weights that train. What was fastest is kept for this GPU, driver
and libraries (`blockshock.tuning`), where every later use of the size finds it.

    python -m blockshock.tune block_sparse --shape 8192x8192 --block 64 --sparsity 0.9 --B 4096

measures the plans of the block-sparse kernels, on one GPU. `--ship` adds them to the table that
comes with the package.
"""

import argparse
import itertools
import logging
import sys

import torch

from blockshock import cache, masks, sources, tuning
from blockshock.block_sparse import plans, tiles
from blockshock.distributed import note, open_ranks
from blockshock.kernels import block_lists, block_plans
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


def block_sparse(argv: list[str]) -> int:
    """The command for block-sparse kernels; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m blockshock.tune block_sparse")
    add = parser.add_argument
    add("--shape", type=_shapes, default=[(8192, 8192)], metavar="NxK[,NxK]", help="of W")
    add("--block", type=_numbers, default=[32, 64, 128], metavar="b[,b]", help="sides of tiles")
    add("--sparsity", type=_rates, default=[0.8, 0.9], metavar="s[,s]", help="of tiles")
    add("--B", type=_numbers, default=[4096], metavar="B[,B]", help="rows of x")
    add("--dtype", type=_known(DTYPES), default=["bf16"], metavar="D[,D]", help="bf16, fp16")
    add("--ship", action="store_true", help=f"adds the answers to {plans.SHIPPED.name}")
    options = parser.parse_args(argv)
    unknown = [block for block in options.block if block not in block_plans.BLOCKS]
    if unknown:
        parser.error(f"--block {unknown[0]}: use {', '.join(map(str, block_plans.BLOCKS))}")
    for shape in options.shape:
        for block in options.block:
            for sparsity in options.sparsity:
                try:
                    tiles.check(block, sparsity, shape)
                except ValueError as error:
                    parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, found none")
    tuning.exact_sizes()
    logging.getLogger("blockshock.tuning").setLevel(logging.ERROR)  # the command tells it all
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype, B, (N, K), block, sparsity in itertools.product(
        options.dtype, options.B, options.shape, options.block, options.sparsity
    ):
        scores = torch.rand(tiles.grid((N, K), (block, block)), device=device)
        lists = block_lists.lists(tiles.keep_top(scores, sparsity))
        x = torch.randn(B, K, dtype=DTYPES[dtype], device=device)
        found = plans.measure((N, K), lists, block, x)
        for question, answer in found.items():
            print(line({"question": question, "way": answer.name, **vars(answer)}), flush=True)
        if options.ship:
            plans.ship(found, device)
    print(f"kept in {plans.SHIPPED if options.ship else cache.folder()}")
    return 0


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    if argv[:1] == ["block_sparse"]:
        return block_sparse(argv[1:])
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


def _shapes(text: str) -> list[tuple[int, int]]:
    pairs = [word.split("x") for word in text.split(",")]
    if not all(len(pair) == 2 and all(n.isdecimal() and int(n) for n in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: shapes are NxK, such as 8192x8192")
    return [(int(N), int(K)) for N, K in pairs]


def _rates(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: sparsities are numbers below 1") from None


def _known(valid):
    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in valid:
                raise argparse.ArgumentTypeError(f"{name!r}: use {', '.join(valid)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
