"""What the tests of block-sparse layers share: problems, and the masked dense layer in float64."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from blockshock.block_sparse import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bf16 as integers.
HALVES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu}


@st.composite
def problems(draw, blocks=(16, 32, 64)):
    """(block, tile mask, N, K, B): ragged edges, empty rows and columns, one tile, all of them."""
    block = draw(st.sampled_from(blocks))
    R, C = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    N, K = (n * block - draw(st.integers(0, block - 1)) for n in (R, C))
    kind = draw(st.sampled_from(["some", "some", "one", "all"]))
    mask = torch.full((R, C), kind == "all")
    if kind == "some":
        mask = torch.tensor([[draw(st.booleans()) for _ in range(C)] for _ in range(R)])
    mask[draw(st.integers(0, R - 1)), draw(st.integers(0, C - 1))] = True
    return block, mask.to(DEVICE), N, K, draw(st.integers(1, 150))


def whole(*shape, seed=0, dtype=torch.float32):
    """Small whole numbers, whose products and sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(DEVICE, dtype)


def truth(weight, bias, mask, block, x, dy, activation=None):
    """y, dx, dw (dense, masked) and db of the masked dense layer, in float64."""
    weight, x = (t.detach().double().requires_grad_() for t in (weight, x))
    bias = None if bias is None else bias.detach().double().requires_grad_()
    kept = tiles.expand(mask, weight.shape, (block, block))
    y = ACTIVATIONS[activation](F.linear(x, weight * kept, bias))
    y.backward(dy.double())
    return y.detach(), x.grad, weight.grad, None if bias is None else bias.grad


def relative(found, true):
    """Frobenius; of a true zero the found norm."""
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).norm() / (true.norm() if true.any() else 1))
