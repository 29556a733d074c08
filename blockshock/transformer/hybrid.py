"""A block that R ranks compute together: block-sparse attention by heads, and an MLP in parts.

    h = rms(x) ∘ s                        x, h [B, T, width]: alike on all ranks
    P_r = attend(q_r, k_r, v_r) out_rᵀ    q_r, k_r, v_r = h qkv_rᵀ: heads/R heads
    x = x + Σ_r P_r
    h = rms(x) ∘ s'
    P_r = (silu(g_r) ∘ u_r) down_rᵀ       g_r, u_r = h gate_up_rᵀ: hidden/R units
    y = x + Σ_r P_r

    backward of each half:   dP_r = dy     dh = Σ_r dh_r     dx = dy + what rms makes of dh

A head needs no keys of other ranks, so a pattern costs no communication: there are two sums of
[B, T, width] forward and two backward, whatever is attended to. Norms and residual stream are
computed by all ranks from the same bits, so scales get whole gradients without a sum. qkv and
gate_up are column-parallel, out and down row-parallel (Megatron-LM, arXiv:1909.08053).

The block adds no positions: they are in x. SwiGLU: Shazeer, arXiv:2002.05202. Sliding windows:
Longformer, arXiv:2004.05150; other patterns: `attention.patterns`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock import attention as family
from blockshock.attention.headed import some_heads
from blockshock.attention.rules import Pattern
from blockshock.distributed import reduce as ways
from blockshock.linear.alike import Check, together
from blockshock.measure.regions import region
from blockshock.transformer.config import usual_attention, usual_hidden
from blockshock.transformer.parts import ColumnParallelLinear, RowParallelLinear
from blockshock.transformer.sublayers import mlp, rms
from blockshock.transformer.sums import Sums
from blockshock.transformer.whole import Whole, check_even, told

EPS = 1e-5  # of the norms
STD = 0.02  # of initial weights; out and down, which write to the stream, have STD / √2


class HybridBlock(Whole):
    """x [B, T, width] -> [B, T, width]; called alike on all ranks of a group.

    heads: of queries; kv_heads: of keys and values, a divisor of heads (None: heads). hidden: units
    of the MLP (None: 8/3 width, rounded up to a multiple of 128). The ranks must divide all three.
    pattern: of all heads (`attention.patterns`), of which each rank takes its own; None: every pair
    attends. causal: query i sees keys j <= i, beside what the pattern says. attention: a name in
    `blockshock.attention.METHODS` (None: flash_triton on CUDA and flash_torch elsewhere; with a
    pattern block_sparse, reference). group: None for the default one, or one process alone. reduce:
    a name in `distributed.reduce.SUMS`, of the sums forward and backward. generator: of the initial
    weights, drawn in float32 on its device (None: PyTorch's default one of the CPU), the same for
    any number of ranks. device, dtype: of the parameters.

    The result and the gradient of x have the same bits on all ranks, and are the dense block's
    (`dense_reference`). Gradients of parts are those of the whole weights, restricted. Nobody
    scales anything. The state_dict is this rank's; `full_state_dict` has the whole weights.

    Raises:
        ValueError: sizes that cannot be dealt out, an attention method that cannot run, or ranks
            that differ in arguments or seeds.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        hidden: int | None = None,
        pattern: Pattern | None = None,
        causal: bool = True,
        attention: str | None = None,
        group=None,
        reduce: str = "collective",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        hidden = usual_hidden(width) if hidden is None else hidden
        device = torch.device(device or "cpu")
        self.width, self.causal, self.attention_method = width, causal, attention
        self.sums = Sums(group, reduce)
        ranks, rank = self.sums.ranks, self.sums.rank
        sizes = {"width": width, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
        more = {"causal": causal, "attention": attention, "reduce": reduce, "dtype": dtype}
        with together(group, "making a HybridBlock") as facts:
            _check_sizes(ranks, width, heads, kv_heads, hidden)
            _check_methods(self, heads, kv_heads, pattern, device.type, dtype)
            alike = {**sizes, **more, "pattern": pattern and pattern.name}
            facts["the arguments"] = told(alike, generator)
        self.own_heads, self.own_kv_heads = heads // ranks, kv_heads // ranks
        first = rank * self.own_heads
        self.pattern = pattern and some_heads(pattern, first, first + self.own_heads)
        D = width // heads
        sections = {"qkv": (width, kv_heads * D, kv_heads * D), "gate_up": (hidden, hidden)}
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, EPS) for _ in range(2))
        for name, whole in _drawn(width, kv_heads * D, hidden, generator):
            if name in sections:
                layer = ColumnParallelLinear.from_dense(whole, None, group, sections=sections[name])
            else:
                layer = RowParallelLinear.from_dense(whole, None, group)
            setattr(self, name, layer.to(device, dtype))  # before the next whole one is drawn
        self.to(device, dtype)
        self.compile_parts(lambda part: part)
        self._first_calls = Check("HybridBlock")

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width], alike on all ranks, in the weights' dtype (or any inside an autocast).

        The first calls, in training and in eval, compare the ranks' x; the host waits there.

        Raises:
            ValueError: another shape, or x that differ by more than rounding.
        """
        if x.dim() != 3 or x.shape[-1] != self.width:
            raise ValueError(f"x {list(x.shape)}: [batch, tokens, {self.width}] is needed")
        self._compare(x)
        x = x + self.attention(x)
        return x + self.mlp(x)

    @property
    def group(self):
        """Of the ranks that hold the block; None for the default one."""
        return self.sums.group

    @torch.compiler.disable(reason="ranks talk to each other between compiled computations")
    def _compare(self, x: Tensor) -> None:
        if self.sums.ranks > 1 and not x.is_meta:
            self._first_calls.look("x", x.flatten(0, 1), self)

    def attention(self, x: Tensor) -> Tensor:
        """What the attention half adds to x, the same bits on all ranks."""
        h = self.sums.enter(rms(x, self.attention_norm.weight, EPS))
        weights = self.qkv.values("weight"), self.out.values("weight")
        method = self.attention_method or usual_attention(x.device.type, self.pattern)
        with region("attention"):
            part = self._attention(
                h, *weights, self.own_heads, self.own_kv_heads, self.causal, self.pattern, method
            )
        return self.sums.leave(part)

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP half adds to x, the same bits on all ranks."""
        h = self.sums.enter(rms(x, self.mlp_norm.weight, EPS))
        with region("mlp"):
            part = self._mlp(h, self.gate_up.values("weight"), self.down.values("weight"))
        return self.sums.leave(part)

    def compile_parts(self, compiler: Callable) -> None:
        """Puts compiler(function) in the place of what is computed between norm and sum."""
        self._attention, self._mlp = compiler(_attention_part), compiler(_mlp_part)


def _attention_part(h, qkv, out, heads, kv_heads, causal, pattern, method) -> Tensor:
    """P_r [B, T, width]; qkv [(heads + 2 kv_heads) D, width] and out [width, heads D]: here."""
    D = len(qkv) // (heads + 2 * kv_heads)
    q, k, v = (
        F.linear(h, qkv)
        .unflatten(-1, (-1, D))
        .transpose(1, 2)
        .split((heads, kv_heads, kv_heads), dim=1)
    )
    mixed = family.METHODS[method](q, k, v, causal=causal, pattern=pattern)
    return F.linear(mixed.transpose(1, 2).flatten(2), out)


def _mlp_part(h, gate_up, down) -> Tensor:
    """P_r [B, T, width]; gate_up [2 hidden / R, width] and down [width, hidden / R]."""
    return mlp(h, partial(F.linear, weight=gate_up), partial(F.linear, weight=down))


def initial_weights(
    width: int, heads: int, kv_heads: int, hidden: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The state of a dense block, float32, as a `HybridBlock` of the same generator begins."""
    drawn = dict(_drawn(width, kv_heads * (width // heads), hidden, generator))
    scale = torch.ones(width, device=drawn["qkv"].device)
    found = {"attention_norm": scale, "mlp_norm": scale.clone(), **drawn}
    return {f"{name}.weight": weight for name, weight in found.items()}


def dense_reference(
    x: Tensor,
    weights: dict[str, Tensor],
    heads: int,
    *,
    pattern: Pattern | None = None,
    causal: bool = True,
    attend: Callable = family.METHODS["reference"],
) -> Tensor:
    """The block in one process, in plain PyTorch: x [B, T, width] -> [B, T, width].

    weights: whole ones, as `full_state_dict` gives them, in the dtype of x; differentiable in x and
    in each. attend: a method of attention. What it must equal is here, so it shares no code.
    """
    x = x + dense_attention(x, weights, heads, pattern=pattern, causal=causal, attend=attend)
    h = F.rms_norm(x, x.shape[-1:], weights["mlp_norm.weight"], EPS)
    gate, up = (h @ weights["gate_up.weight"].T).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ weights["down.weight"].T


def dense_attention(x, weights, heads, *, pattern, causal, attend) -> Tensor:
    """What attention adds to x in `dense_reference`, with its arguments."""
    B, T, width = x.shape
    h = F.rms_norm(x, (width,), weights["attention_norm.weight"], EPS)
    D = width // heads
    qkv = (h @ weights["qkv.weight"].T).view(B, T, -1, D).transpose(1, 2)
    kv_heads = (qkv.shape[1] - heads) // 2
    q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    mixed = attend(q, k, v, causal=causal, pattern=pattern)
    return mixed.transpose(1, 2).reshape(B, T, width) @ weights["out.weight"].T


def _drawn(width: int, keys: int, hidden: int, generator):
    """(name, whole weight) one after another, float32 on the generator's device."""
    device, small = generator.device if generator else "cpu", STD / 2**0.5
    for name, rows, columns, std in (
        ("qkv", width + 2 * keys, width, STD),
        ("out", width, width, small),
        ("gate_up", 2 * hidden, width, STD),
        ("down", width, hidden, small),
    ):
        empty = torch.empty(rows, columns, device=device, dtype=torch.float32)
        yield name, empty.normal_(0, std, generator=generator)


def _check_sizes(ranks: int, width: int, heads: int, kv_heads: int, hidden: int) -> None:
    sizes = {"width": width, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} = {size!r}: an int of at least 1 is needed")
    if width % heads:
        raise ValueError(
            f"width = {width}, heads = {heads}: the width of a head must be a whole number; make "
            f"width a multiple of {heads}"
        )
    if heads % kv_heads:
        raise ValueError(
            f"kv_heads = {kv_heads} is no divisor of heads = {heads}: each serves equally many "
            "heads of queries; use a divisor"
        )
    check_even(ranks, heads=heads, kv_heads=kv_heads, hidden=hidden)


def _check_methods(block: HybridBlock, heads, kv_heads, pattern, device_type: str, dtype) -> None:
    """Raises ValueError where attention, or the sum over ranks, cannot run there."""
    name = block.attention_method or usual_attention(device_type, pattern)
    batch, _, T, _ = getattr(pattern, "sizes", (None,) * 4)
    q = batch or 1, heads, T or 1, block.width // heads  # those that are free do not matter
    k = batch or 1, kv_heads, T or 1, block.width // heads
    reason = family.unsupported(
        name, q, k, dtype, device_type, block.causal, pattern, backward=True
    )
    if reason is None and block.sums.ranks > 1:
        reason = ways.unsupported(block.sums.reduce, dtype, device_type)
    if reason:
        raise ValueError(reason)
