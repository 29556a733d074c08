"""A Triton kernel runs on the device of its operands and in its stream, whichever is current.

On a GPU, or under Triton's interpreter (see conftest.py).
"""

import pytest
import torch

from blockshock import masks
from blockshock.kernels import block_lists, block_product, flash

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
from triton.runtime.jit import KernelInterface

from blockshock.kernels import add_triton, columns_triton, kept_product_triton, pack_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def halves(*shape, seed=0):
    """Small whole numbers, whose products and sums are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).half()


def codes():
    return masks.encode(masks.make("tile_magnitude", halves(64, 64, seed=2).float()))


def tile_mask():
    return torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)


def filled(launch, *shape, dtype=torch.float16):
    """What a launcher writes into memory of this shape."""

    def run(*operands):
        out = operands[0].new_empty(shape, dtype=dtype)
        launch(*operands, out)
        return [out]

    return run


def joined(a, b):
    out = a.new_empty(8, 64)
    columns_triton.join(a, b, (0, 2), out)
    return [out]


def made_lists(mask):
    return block_lists.lists_by_triton(mask, 3).tensors()


def block_products(x, dz, values, mask):
    lists = block_lists.lists_by_triton(mask, 3)
    y, _ = block_product.product(x, values, lists, 32)
    dx, _ = block_product.product(dz, values, lists, 48, transposed=True)
    return [y, dx, block_product.gradient(dz, x, lists, 16)]


def attention(q, k, v, d_out):
    out, lse = flash.forward(q, k, v, scale=0.25)
    return [out, lse, *flash.backward(q, k, v, out, lse, d_out, scale=0.25)]


# Of each: operands on the CPU, and what computes tensors of them, wherever they are.
CASES = {
    "add": (
        lambda: [halves(100, seed=seed) for seed in range(3)],
        filled(lambda *all: add_triton.add_in_order(list(all[:-1]), all[-1]), 100),
    ),
    "take": (
        lambda: [halves(8, 64)],
        filled(lambda x, out: columns_triton.take(x, (0, 2), out), 8, 32),
    ),
    "join": (lambda: [halves(8, 32), halves(8, 32, seed=1)], joined),
    "quads": (lambda: [halves(8, 64)], filled(columns_triton.quads, 4, 8, 16)),
    "gather_kept": (lambda: [halves(64, 64), codes()], filled(pack_triton.gather_kept, 64, 32)),
    "expand": (lambda: [halves(64, 32), codes()], filled(pack_triton.expand, 64, 64)),
    "transpose_kept": (
        lambda: [halves(64, 32), codes()],
        filled(pack_triton.transpose_kept, 64, 32),
    ),
    "kept_product": (
        lambda: [halves(8, 64), halves(8, 64, seed=1), codes()],
        lambda *operands: [kept_product_triton.kept_product(*operands)],
    ),
    "block_lists": (lambda: [tile_mask()], made_lists),
    "block_product": (
        lambda: [halves(8, 48), halves(8, 32, seed=1), halves(3, 16, 16), tile_mask()],
        block_products,
    ),
    "attention": (lambda: [halves(1, 2, 70, 16, seed=seed) for seed in range(4)], attention),
    "attention of few queries": (
        lambda: [halves(1, 1, tokens, 16, seed=tokens) for tokens in (1, 600, 600, 1)],
        attention,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_launch_is_on_the_device_of_an_operand(name, monkeypatch):
    current, launched = [], []

    class Recorded(torch.cuda.device_of):
        def __init__(self, x):
            super().__init__(x)
            self.x = x

        def __enter__(self):
            current.append(self.x)
            super().__enter__()

        def __exit__(self, *error):
            current.pop()
            return super().__exit__(*error)

    launch = KernelInterface.__getitem__
    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda *of: launched.append(bool(current)) or launch(*of)
    )
    operands, run = CASES[name]
    run(*(x.to(DEVICE) for x in operands()))
    assert launched
    assert all(launched)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_follows_what_wrote_its_operands_on_another_gpu_than_the_current_one(name):
    operands, run = CASES[name]
    whole = [x.to("cuda:0") for x in operands()]
    there = [x.to("cuda:1") for x in whole]
    given = [torch.zeros_like(x) for x in there]
    with torch.cuda.device("cuda:0"):
        expected = run(*whole)
        run(*there)  # compiled and loaded: the host must not wait below
        torch.cuda.synchronize("cuda:1")
        with torch.cuda.device("cuda:1"):
            torch.cuda._sleep(20_000_000)  # some 10 ms
        for x, source in zip(given, there, strict=True):
            x.copy_(source)
        found = run(*given)
    for own, other in zip(expected, found, strict=True):
        assert other.device.index == 1
        assert torch.equal(own.cpu(), other.cpu())
