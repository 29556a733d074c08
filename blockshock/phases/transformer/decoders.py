"""The dense decoder of a point, with its first weights and tokens, and the parallel one."""

import copy
from collections.abc import Iterable

import torch
import torch.compiler.config as compiler
from torch import Tensor

from blockshock.distributed import collectives
from blockshock.phases.transformer.case import TransformerCase
from blockshock.sources import generator
from blockshock.transformer import Decoder, TensorParallelDecoder
from blockshock.transformer.language_model import LanguageModel
from blockshock.transformer.sync import Plan, plan

# Of one function, which PyTorch keeps: the cases of a point ask for more than its usual 8.
COMPILATIONS = 64


class Dense:
    """The decoder of a point as one process has it, the same on every rank, and its tokens.

    dtype: of the parameters. tokens int64 [batch, count].
    """

    def __init__(self, case: TransformerCase, device: torch.device, dtype: torch.dtype, count: int):
        self.case, self.device, self.ranks = case, device, collectives.group_size()
        self.truth_dtype = torch.float64 if case.dtype == "fp32" else torch.float32
        if case.compiled:
            torch.compiler.reset()
            compiler.recompile_limit = COMPILATIONS
        self.model = self.drawn(Decoder).to(dtype)
        drawn = generator("cpu", "transformer/tokens", case.problem_seed)
        size = case.batch, count
        self.tokens = torch.randint(case.vocabulary, size, generator=drawn).to(device)

    def warm_up(self) -> None:
        """Nothing: the check runs a step first."""

    def drawn(self, cls: type, **options) -> LanguageModel:
        """A decoder of that class with the first weights, which are drawn on the device."""
        weights = generator(self.device, "transformer", self.case.problem_seed)
        with self.device:
            return cls(self.case.config, generator=weights, **options)

    def parallel(self, case: TransformerCase) -> TensorParallelDecoder:
        """The case's model, with the same weights."""
        model = self.drawn(
            TensorParallelDecoder,
            plan=case.plan,
            reduce=case.reduce,
            vocabulary_parallel=case.vocabulary_parallel,
            checkpoint_blocks=case.checkpointed,
            device=self.device,
        )
        return model.to(self.model.embedding.weight.dtype)

    def plan(self, case: TransformerCase) -> Plan:
        return plan(case.plan, case.depth)

    def in_dtype(self, dtype: torch.dtype) -> Decoder:
        """A copy of the dense model for a truth or a yardstick, with parameters in `dtype`."""
        return copy.deepcopy(self.model).to(dtype)


def paths(case: TransformerCase, model: TensorParallelDecoder, rows: int) -> dict[str, str]:
    """For the result: what ran. rows: of the stream that is summed."""
    device = model.embedding.weight.device
    stream = torch.empty(rows, case.width, dtype=case.torch_dtype, device=device)
    attention = case.config.attention_on(device.type)
    return {"attention": attention, "reduce": str(model.sums.plan(stream))}


def flat(state: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([state[name].flatten() for name in names])
