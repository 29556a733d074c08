"""What the tests of both 2:4 kernels multiply: a matrix, its mask, and memory that was poisoned."""

import torch
import torch.nn.functional as F

from blockshock import masks
from blockshock.kernels import pack


class Matrix:
    """W [N, K] with a mask, and its kept values; term: 1 for what the mask drops."""

    def __init__(self, N, K, pattern="random", dtype=torch.bfloat16, device="cuda", term=0):
        generator = torch.Generator(device).manual_seed(N + K)
        self.weight = torch.randn(N, K, generator=generator, device=device).to(dtype)
        mask = masks.make(pattern, self.weight)
        mask = ~mask if term else mask
        self.codes = masks.encode(mask)
        self.dense = self.weight * mask
        self.values = pack.gather_kept(self.weight, self.codes)

    def input(self, B, seed=0):
        generator = torch.Generator(self.weight.device).manual_seed(seed)
        K = self.weight.shape[1]
        x = torch.randn(B, K, generator=generator, device=self.weight.device)
        return x.to(self.weight.dtype)

    def bias(self):
        return self.input(1, seed=1).new_empty(len(self.weight)).normal_()

    def truth(self, x, bias=None):
        """X Wᵀ + b in float64."""
        return F.linear(x.double(), self.dense.double(), None if bias is None else bias.double())


def poison():
    """Blocks of NaN of many sizes, given back at once: new memory comes from them."""
    held = [torch.full((1 << n,), torch.nan, device="cuda") for n in range(7, 24) for _ in "ab"]
    del held
