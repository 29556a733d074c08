"""Embedding and head of which each rank holds the rows of some tokens, e_r and h_r [V/R, width].

    x       = Σ_r e_r[token]                           one sum forward; e_r[token] = 0 elsewhere
    logits  = concat_r rms(x) h_rᵀ                     one gather forward
    loss    = log Σ_r exp(lse_r) − Σ_r t_r             one gather forward, of [R, 2, B T]
              lse_r = log Σ_v exp(logit_rv)            t_r: the target's logit, 0 elsewhere

and dx of the head is summed: one collective backward. (Megatron-LM, arXiv:1909.08053, section 3,
where the loss takes three sums.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.distributed import collectives
from blockshock.transformer.decoder import IGNORED, Head
from blockshock.transformer.parts import ColumnParallelLinear, PartLayer, Rows, taken
from blockshock.transformer.sublayers import rms
from blockshock.transformer.sums import Sums


class VocabularyEmbedding(PartLayer):
    """tokens int64 [...] -> y_r [..., width]: rows of tokens that this rank has, else zeros."""

    def __init__(self, weight: Tensor, group=None):
        rows = Rows((len(weight) * collectives.group_size(group),))
        super().__init__(weight, None, {"weight": rows}, group)

    @classmethod
    def from_dense(cls, weight: Tensor, group=None):
        """Of a whole weight [vocabulary, width]; it is copied.

        Raises:
            ValueError: the vocabulary is no multiple of the ranks.
        """
        return cls(taken(Rows((len(weight),)), group)(weight), group)

    def forward(self, tokens: Tensor) -> Tensor:
        """To be summed over the ranks. A token beyond the vocabulary is PyTorch's error."""
        place, mine = own_rows(tokens, len(self.weight), self.rank, self.ranks)
        found = F.embedding(place, self.values("weight"))
        return torch.where(mine[..., None], found, 0)


def own_rows(indices: Tensor, height: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """(places in this rank's rows, whether the index is one of them).

    An index that another rank has is 0; one that no rank has stays out of range, to be refused.
    """
    place = indices - rank * height
    mine = (place >= 0) & (place < height)
    others = (indices >= 0) & (indices < ranks * height) & ~mine
    return place.masked_fill(others, 0), mine


class VocabularyHead(nn.Module):
    """The last norm, the logits and the loss, of which this rank has some tokens' rows."""

    def __init__(self, dense: Head, weight: nn.Parameter | None, sums: Sums):
        super().__init__()
        self.norm, self.sums = dense.norm, sums
        self.linear = ColumnParallelLinear.from_dense(dense.linear.weight, None, sums.group)
        if weight is not None:
            self.linear.weight = weight
        self.logits, self.statistics = _logits, _statistics

    def compile_parts(self, compiler: Callable) -> None:
        """What is computed before a collective."""
        self.logits, self.statistics = map(compiler, (_logits, _statistics))

    def forward(self, x: Tensor, targets: Tensor | None, scale: Tensor) -> Tensor:
        """As `Head`; scale: the norm's, entered."""
        sums, weight = self.sums, self.linear.values("weight")
        x = sums.enter(x)
        if targets is None:
            parts = sums.gather(self.logits(x, scale, weight, self.norm.eps))
            return torch.cat(tuple(parts), dim=-1)
        place = sums.rank, sums.ranks
        own = self.statistics(x, scale, weight, self.norm.eps, targets.flatten(), *place)
        lse, target = sums.gather(own).unbind(1)  # [R, B T]
        kept = targets.flatten() != IGNORED
        losses = lse.logsumexp(0) - target.sum(0)
        return losses.masked_fill(~kept, 0).sum() / kept.sum()


def _logits(x, scale, weight, eps):
    """x [B, T, width] -> [B, T, V/R]."""
    return F.linear(rms(x, scale, eps), weight)


def _statistics(x, scale, weight, eps, targets, rank, ranks):
    """x [B, T, width], targets [B T] -> [2, B T]: lse, and the target's logit where it is here."""
    logits = _logits(x, scale, weight, eps).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    place, mine = own_rows(targets.masked_fill(targets == IGNORED, 0), len(weight), rank, ranks)
    found = logits.gather(1, place[:, None])[:, 0]
    return torch.stack([logits.logsumexp(1), found.masked_fill(~mine, 0)])
