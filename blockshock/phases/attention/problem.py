"""What the methods of a point of attention share: q, k, v, the upstream gradient, and truth.

    S = D^-½ Q Kᵀ       P = softmax(S) over the keys attended to       O = P V
    dP = dO Vᵀ          dS = P ∘ (dP - rowsum(P ∘ dP))
    dQ = D^-½ dS K      dK = D^-½ dSᵀ Q     dV = Pᵀ dO

Truth is this in float64, with the mask from the pattern's predicate. Beside it stands the
yardstick: the method `reference` in the case's own dtype. Both are computed in parts of at most
2^25 scores: some batch entries, key heads or query rows at a time. The yardstick's dK and dV of
several parts of rows are each in the case's dtype, and added up in float64.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from blockshock.attention import patterns, shapes, work
from blockshock.attention.reference import reference
from blockshock.distributed import noting
from blockshock.measure.errors import both_errors
from blockshock.phases.attention.case import AttentionCase
from blockshock.sources import generator

SCORES = 2**25  # of a part; several float64 tensors of so many entries are held


class Part(NamedTuple):
    """Some of the work: slices of the batch, of key heads, of their query heads, of query rows."""

    batch: slice
    kv_heads: slice
    heads: slice
    rows: slice

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        """Where it lies in q and in out."""
        return self.batch, self.heads, self.rows

    @property
    def keys(self) -> tuple[slice, slice]:
        """Where it lies in k and in v."""
        return self.batch, self.kv_heads


class AttentionProblem:
    """The data of one point on this rank's device."""

    truth_dtype = torch.float64

    def __init__(self, case: AttentionCase, device: torch.device):
        self.device, self.dtype = device, case.torch_dtype
        self.shape = shapes.Shape.of(case.q_shape, case.k_shape)
        self.causal, self.pattern = case.causal, case.mask

        def drawn(name, shape):
            source = generator(device, f"attention/{name}", case.problem_seed)
            return torch.randn(shape, generator=source, device=device).to(self.dtype)

        self.q, self.d_out = drawn("q", case.q_shape), drawn("d_out", case.q_shape)
        self.k, self.v = drawn("k", case.k_shape), drawn("v", case.k_shape)

    def warm_up(self) -> None:
        """A product, so that the library's workspace is not counted as the first case's memory."""
        x = self.q[0, 0, :8]
        x @ x.t()

    @cached_property
    @noting("computing the truth")
    def output(self) -> tuple[Tensor, float, float]:
        """The true out, and the yardstick's two errors."""
        truth = self._zeros(self.q)
        plain = torch.zeros_like(self.q)
        for part in self._parts():
            q, k, v, _ = self._inputs(part, self.truth_dtype)
            truth[part.queries] = _flat(self._weights(part, q, k) @ v[:, :, None])
            plain[part.queries] = reference(*self._inputs(part)[:3], pattern=self._shifted(part))
        return truth, *both_errors(plain, truth)

    @cached_property
    @noting("computing the truth")
    def gradients(self) -> tuple[tuple[Tensor, float, float], ...]:
        """Of q, of k and of v: the true gradient, and the yardstick's two errors."""
        inputs = self.q, self.k, self.v
        truths = dq, dk, dv = tuple(self._zeros(x) for x in inputs)
        plains = tuple(self._zeros(x) for x in inputs)
        for part in self._parts():
            q, k, v, d_out = self._inputs(part, self.truth_dtype)
            grouped, d_rows = self._grouped(q), self._grouped(d_out)
            weights = self._weights(part, q, k)
            d_scores = d_rows @ v[:, :, None].mT
            d_scores -= (weights * d_scores).sum(dim=-1, keepdim=True)
            d_scores.mul_(weights).mul_(self.shape.D**-0.5)
            dq[part.queries] = _flat(d_scores @ k[:, :, None])
            dk[part.keys] += (d_scores.mT @ grouped).sum(dim=2)
            dv[part.keys] += (weights.mT @ d_rows).sum(dim=2)
            places = part.queries, part.keys, part.keys
            of_part = self._reference_gradients(part)
            for total, place, gradient in zip(plains, places, of_part, strict=True):
                total[place] += gradient
        return tuple(
            (truth, *both_errors(plain.to(self.dtype), truth))
            for truth, plain in zip(truths, plains, strict=True)
        )

    @cached_property
    def pairs(self) -> int:
        """How many pairs attend, in all batch entries and heads."""
        s = self.shape
        return work.pairs(
            self.pattern, self.causal, s.Tq, s.Tk, s.batch, s.heads, device=self.device
        )

    def poison(self) -> None:
        """Leaves NaN in freed memory: an entry that a method does not write cannot pass."""
        nans = [torch.full_like(x, torch.nan) for x in (self.q, self.k, self.v)]
        del nans

    def _parts(self) -> Iterator[Part]:
        s = self.shape
        rows = max(1, min(s.Tq, SCORES // (s.group * s.Tk)))
        heads = max(1, min(s.kv_heads, SCORES // (s.group * rows * s.Tk)))
        batch = max(1, min(s.batch, SCORES // (heads * s.group * rows * s.Tk)))
        for b in range(0, s.batch, batch):
            for h in range(0, s.kv_heads, heads):
                end = min(h + heads, s.kv_heads)
                for r in range(0, s.Tq, rows):
                    yield Part(
                        slice(b, min(b + batch, s.batch)),
                        slice(h, end),
                        slice(h * s.group, end * s.group),
                        slice(r, min(r + rows, s.Tq)),
                    )

    def _inputs(self, part: Part, dtype=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, d_out of a part."""
        found = (
            self.q[part.queries],
            self.k[part.keys],
            self.v[part.keys],
            self.d_out[part.queries],
        )
        return tuple(x.to(dtype or self.dtype) for x in found)

    def _weights(self, part: Part, q: Tensor, k: Tensor) -> Tensor:
        """P [batch, kv_heads, group, rows, Tk] of a part, in float64."""
        scores = (self._grouped(q) @ k[:, :, None].mT).mul_(self.shape.D**-0.5)
        seen = self._seen(part)
        scores.masked_fill_(~seen, -torch.inf)
        empty = ~seen.any(dim=-1, keepdim=True)
        # An empty row is given equal scores first: softmax of -inf alone is NaN.
        return scores.masked_fill_(empty, 0).softmax(dim=-1).masked_fill_(empty, 0)

    def _seen(self, part: Part) -> Tensor:
        """The mask of a part, bool, broadcasts to [batch, kv_heads, group, rows, Tk]."""
        query = torch.arange(part.rows.start, part.rows.stop, device=self.device)[:, None]
        key = torch.arange(self.shape.Tk, device=self.device)
        seen = key <= query if self.causal else torch.ones_like(key <= query)
        if self.pattern is None:
            return seen
        batch = torch.arange(part.batch.start, part.batch.stop, device=self.device)
        head = torch.arange(part.heads.start, part.heads.stop, device=self.device)
        batch = batch if self.pattern.per_batch else batch[:1]
        head = head if self.pattern.per_head else head[:1]
        told = patterns.evaluate(
            self.pattern, batch.view(-1, 1, 1, 1), head.view(-1, 1, 1), query, key
        )
        return seen & (
            told.unflatten(1, (-1, self.shape.group)) if len(head) > 1 else told[:, None]
        )

    def _reference_gradients(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, d_out = self._inputs(part)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = reference(*inputs, pattern=self._shifted(part))
        return torch.autograd.grad(out, inputs, d_out)

    def _shifted(self, part: Part) -> patterns.Pattern:
        """Pattern and causal mask as seen from the first row, head and batch entry of a part."""
        row, head, batch = part.rows.start, part.heads.start, part.batch.start
        whole = self.pattern or patterns.full()

        def predicate(b, h, query, key):
            seen = whole.predicate(b + batch, h + head, query + row, key)
            return seen & (key <= query + row) if self.causal else seen

        return patterns.Pattern(
            f"part of {whole.name}",
            predicate,
            per_batch=whole.per_batch,
            per_head=whole.per_head,
        )

    def _grouped(self, x: Tensor) -> Tensor:
        """[batch, heads, rows, D] -> [batch, kv_heads, group, rows, D]."""
        return x.unflatten(1, (-1, self.shape.group))

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.truth_dtype, device=self.device)


def _flat(x: Tensor) -> Tensor:
    """[batch, kv_heads, group, rows, D] -> [batch, heads, rows, D]."""
    return x.flatten(1, 2)
