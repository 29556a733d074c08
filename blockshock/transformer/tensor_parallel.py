"""A decoder that R ranks compute together, with as many sums over the ranks as a plan says.

    attention   P_r = out_r(attend(q_r, k_r, v_r))    q_r, k_r, v_r: of the rank's heads
    mlp         P_r = down_r(silu(g_r) ∘ u_r)         g_r, u_r: of the rank's hidden units

qkv and gate_up are column-parallel, out and down row-parallel (Megatron-LM, arXiv:1909.08053).
What becomes of the P_r [B, T, width] is in `sync`. Each rank holds all norm scales and the biases
of out and down (shared), and its part of the rest. The shared ones act on streams that differ from
rank to rank, so their gradients are summed: they go through one `Sums.enter` as one flat tensor,
whose views are used, which costs one collective a backward. With S syncs a step takes S sums
forward and S + 1 backward.

The embedding and the head are whole on every rank, and all ranks compute the same; or, with
vocabulary_parallel, they are in parts (`vocabulary`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blockshock.attention.headed import some_heads
from blockshock.attention.rules import Pattern
from blockshock.distributed import collectives
from blockshock.distributed import reduce as ways
from blockshock.linear.alike import digest, together
from blockshock.transformer import sync
from blockshock.transformer.config import DecoderConfig
from blockshock.transformer.decoder import Block, Decoder, Head, drawn
from blockshock.transformer.language_model import LanguageModel
from blockshock.transformer.parts import ColumnParallelLinear, RowParallelLinear
from blockshock.transformer.sublayers import attention, mlp, rms
from blockshock.transformer.sums import Sums
from blockshock.transformer.sync import Plan, advance
from blockshock.transformer.vocabulary import VocabularyEmbedding, VocabularyHead
from blockshock.transformer.whole import Whole, check_even, told

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "TensorParallelDecoder"]
# Of a sublayer: up to 4 places in a group, with and without a backward, for each kind of sizes;
# PyTorch's usual limit is 8.
COMPILATIONS = 64

LOOKS = 2  # first calls whose tokens and targets are compared


class ParallelBlock(nn.Module):
    """A rank's part of a dense block, with the same names. It is not called: see `sync.run`."""

    def __init__(self, dense: Block, group):
        super().__init__()
        config, D = dense.config, dense.config.head_width
        heads = config.heads * D, config.kv_heads * D, config.kv_heads * D
        row, column = RowParallelLinear.from_dense, ColumnParallelLinear.from_dense
        qkv, out, gate_up, down = dense.qkv, dense.out, dense.gate_up, dense.down
        self.attention_norm, self.mlp_norm = dense.attention_norm, dense.mlp_norm
        self.qkv = column(qkv.weight, qkv.bias, group, sections=heads)
        self.out = row(out.weight, out.bias, group)
        self.gate_up = column(gate_up.weight, gate_up.bias, group, sections=[config.hidden] * 2)
        self.down = row(down.weight, down.bias, group)

    def shared(self) -> list[Tensor | None]:
        """What every rank holds whole: of attention the norm's scale and the bias, then of mlp."""
        return [self.attention_norm.weight, self.out.bias, self.mlp_norm.weight, self.down.bias]


class TensorParallelDecoder(Whole, LanguageModel):
    """A `Decoder` in parts, called alike on all ranks of a group: same arguments, same results.

    config: as of `Decoder`, without `linear`; the ranks must divide heads, kv_heads and hidden.
    plan: a name that `sync.plan` knows, or a `sync.Plan`. group: None for the default one, or one
    process alone. reduce: a name in `distributed.reduce.SUMS`, of the sums forward and backward.
    vocabulary_parallel: embedding and head are dealt out as well; the ranks must divide the
    vocabulary. checkpoint_blocks: each sublayer keeps its inputs alone. generator, device: as of
    `Decoder`; weights are drawn as it draws them, whatever the number of ranks.

    After a backward every parameter has the gradient of what all ranks compute together: shared
    ones the same bits on all ranks, parts their own. Embedding and head have the same bits where
    they are in parts, or where kernels add in the same order on all ranks.

    Its state_dict is this rank's. `full_state_dict` is a `Decoder`'s, for any number of ranks. What
    it computes depends on the plan and the number of ranks: with "tp" alone it is the dense
    decoder.

    Raises:
        ValueError: sizes that cannot be dealt out, a plan of another depth, or ranks that differ in
            arguments or seeds. At the first calls, ranks that differ in tokens or targets.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        plan: str | Plan = "tp",
        group=None,
        reduce: str = "collective",
        vocabulary_parallel: bool = False,
        checkpoint_blocks: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config, self.checkpointed, self.looks = config, checkpoint_blocks, LOOKS
        self.vocabulary_parallel = vocabulary_parallel
        self.plan = plan if isinstance(plan, Plan) else sync.plan(plan, config.depth)
        self.sums = Sums(group, reduce)
        self.ranks = self.sums.ranks
        with together(group, "making a TensorParallelDecoder") as facts:
            _check(self, torch.device(device or "cpu").type)
            facts["the arguments"] = _facts(self, generator)
        self.pattern = _own_heads(config.pattern, config.heads // self.ranks, self.sums.rank)
        self.steps = self.cached_steps = _attention_step, _mlp_step
        self.compiling = nullcontext

        def block():
            return ParallelBlock(Block(config, False, generator), group)

        self.embedding, self.blocks, self.head = drawn(config, block, generator)
        if vocabulary_parallel:
            self.embedding = VocabularyEmbedding.from_dense(self.embedding.weight, group)
            tied = self.embedding.weight if config.tied else None
            self.head = VocabularyHead(self.head, tied, self.sums)
        self.to(device)

    def compute(self, tokens, rope, targets=None, *, caches=None, start=0, last=False) -> Tensor:
        """As in `LanguageModel`. At the first calls the ranks compare what they are given."""
        self._look(tokens, targets)
        shared = self._shared()
        steps, biases = self._sublayers(rope, shared, caches, start)
        with self.compiling():
            x = sync.run(self.plan, self._embed(tokens), steps, biases, self.sums)
        x, scale = x[:, -1:] if last else x, next(shared)
        if self.vocabulary_parallel:
            return self.head(x, targets, scale)
        scale = self.sums.once(scale)
        return self.head.compute(x, None, scale) if last else self.head(x, targets, scale)

    def compile_parts(self, compiler: Callable) -> None:
        """The sublayers, and what the head computes between collectives."""
        self.steps = tuple(map(compiler, (_attention_step, _mlp_step)))
        self.compiling = _compiling
        if self.vocabulary_parallel:
            self.head.compile_parts(compiler)
        else:
            self.head.run = compiler(Head.compute)

    def compile_decoding(self, **options) -> None:
        """Compiles the sublayers of `decode_step`, for each position anew; in place.

        For steps at one position, as a CUDA graph has them: PyTorch keeps few compilations of a
        function. options: for `torch.compile`.
        """
        compiler = partial(torch.compile, fullgraph=True, dynamic=False, **options)
        self.cached_steps = tuple(map(compiler, (_attention_step, _mlp_step)))
        self.compiling = _compiling

    def to_dense(self) -> Decoder:
        """The whole weights in a `Decoder` on every rank, which is "tp" in one. A collective."""
        weight = self.embedding.weight
        dense = Decoder(self.config, generator=torch.Generator())
        dense.to(weight.device, weight.dtype)
        dense.load_state_dict(self.full_state_dict())
        return dense

    @torch.no_grad()
    def replicas_apart(self) -> float:
        """How far the ranks' norm scales and biases of out and down are from the first rank's.

        The largest relative difference, alike on all ranks: 0 where all have the same bits. A
        collective.
        """
        flat = torch.cat([vector for vector in self._vectors() if vector is not None])
        first = collectives.all_gather(flat, self.sums.group)[0]
        own = (flat - first).double().norm() / first.double().norm()
        return float(collectives.all_gather(own[None], self.sums.group).max())

    def _alike(self, token: Tensor) -> Tensor:
        # Generators may differ, and so may the last bits of whole logits.
        return collectives.all_gather(token, self.sums.group)[0]

    def _embed(self, tokens: Tensor) -> Tensor:
        x = super()._embed(tokens)
        return self.sums.leave(x) if self.vocabulary_parallel else x

    @torch.compiler.disable(reason="the ranks talk by the process group's store")
    def _look(self, tokens: Tensor, targets: Tensor | None) -> None:
        capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.ranks == 1 or self.looks == 0 or capturing:
            return
        self.looks -= 1
        given = {"tokens": tokens, "targets": targets}
        with together(self.sums.group, "a call of a TensorParallelDecoder") as facts:
            facts["the call"] = {
                name: f"{list(tensor.shape)}, digest {digest(tensor):x}"
                for name, tensor in given.items()
                if tensor is not None
            }

    def _vectors(self) -> list[Tensor | None]:
        norm = self.head.norm.weight
        return [*(vector for block in self.blocks for vector in block.shared()), norm]

    def _shared(self) -> Iterator[Tensor | None]:
        """Of each block what its `shared` lists, then the last norm's scale; entered together."""
        whole = self._vectors()
        if self.ranks == 1 or not torch.is_grad_enabled():
            return iter(whole)
        flat = self.sums.enter(torch.cat([vector for vector in whole if vector is not None]))
        views = iter(flat.split([len(vector) for vector in whole if vector is not None]))
        return iter([None if vector is None else next(views) for vector in whole])

    def _sublayers(self, rope, shared, caches, start) -> tuple[list[Callable], list]:
        """The steps of all sublayers, for `sync.run`, and their biases."""
        attend, multiply = self.steps if caches is None else self.cached_steps
        of_attention = rope, self.config, self.pattern
        steps, biases = [], []
        for place, block in enumerate(self.blocks):
            scale, bias = next(shared), next(shared)
            weights = scale, *block.qkv.both(), block.out.values("weight"), bias
            cache = None if caches is None else caches[place]
            steps.append(partial(self._run, attend, *weights, *of_attention, cache, start))
            biases.append(bias)
            scale, bias = next(shared), next(shared)
            weights = scale, *block.gate_up.both(), block.down.values("weight"), bias
            steps.append(partial(self._run, multiply, *weights, self.config.eps))
            biases.append(bias)
        return steps, biases

    def _run(self, step: Callable, *arguments):
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(step, *arguments, use_reentrant=False)
        return step(*arguments)


def _compiling() -> AbstractContextManager:
    from torch._dynamo import config  # seconds to import

    return config.patch(recompile_limit=COMPILATIONS)


def _attention_step(
    scale, qkv, qkv_bias, out, bias, rope, config, pattern, cache, start, h, D, place
):
    """A `sync.Step`: qkv [(heads + 2 kv_heads) D / R, width], out [width, heads D / R]."""
    projections = partial(F.linear, weight=qkv, bias=qkv_bias), partial(F.linear, weight=out)
    normed = rms(h, scale, config.eps)
    found = attention(normed, *projections, rope, config, pattern, cache, start)
    return advance(h, D, found, bias, place)


def _mlp_step(scale, gate_up, gate_up_bias, down, bias, eps, h, D, place):
    """A `sync.Step`: gate_up [2 hidden / R, width], down [width, hidden / R]."""
    wide = partial(F.linear, weight=gate_up, bias=gate_up_bias)
    found = mlp(rms(h, scale, eps), wide, partial(F.linear, weight=down))
    return advance(h, D, found, bias, place)


def _own_heads(pattern: Pattern | None, heads: int, rank: int) -> Pattern | None:
    return pattern and some_heads(pattern, heads * rank, heads * (rank + 1))


def _check(model: TensorParallelDecoder, device_type: str) -> None:
    """Raises ValueError for what so many ranks cannot hold."""
    config, ranks = model.config, model.ranks
    if config.linear is not None:
        raise ValueError(
            f"linear = {config.linear!r}: a tensor-parallel decoder has projections of its own; "
            "use linear=None"
        )
    if model.plan.depth != config.depth:
        raise ValueError(
            f"plan {model.plan.name!r} is of {model.plan.depth} blocks, the model has "
            f"{config.depth}; make the plan with sync.plan(name, {config.depth})"
        )
    names = ["heads", "kv_heads", "hidden"] + ["vocabulary"] * model.vocabulary_parallel
    check_even(ranks, **{name: getattr(config, name) for name in names})
    reason = ways.unsupported(model.sums.reduce, torch.float32, device_type)
    if reason and ranks > 1:
        raise ValueError(reason)


def _facts(model: TensorParallelDecoder, generator: torch.Generator | None) -> dict[str, str]:
    """What the ranks must have in common."""
    config = {**vars(model.config), "pattern": getattr(model.config.pattern, "name", None)}
    facts = config | {"plan": model.plan, "reduce": model.sums.reduce}
    return told({**facts, "vocabulary_parallel": model.vocabulary_parallel}, generator)
