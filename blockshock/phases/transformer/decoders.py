"""The dense decoder of a point, with its first weights and tokens, and the parallel one."""

import copy

import torch
from torch import Tensor

from blockshock.distributed import collectives
from blockshock.phases.transformer.case import TransformerCase
from blockshock.sources import generator
from blockshock.transformer import Decoder, compile_model
from blockshock.transformer.sync import Plan, plan
from blockshock.transformer.tensor_parallel import TensorParallelDecoder


class Dense:
    """The decoder of a point as one process has it, the same on every rank, and its tokens.

    dtype: of the parameters. tokens int64 [batch, count].
    """

    def __init__(self, case: TransformerCase, device: torch.device, dtype: torch.dtype, count: int):
        self.case, self.device, self.ranks = case, device, collectives.group_size()
        self.truth_dtype = torch.float64 if case.dtype == "fp32" else torch.float32
        if case.compiled:
            torch.compiler.reset()  # PyTorch keeps 8 compilations of a function, and then refuses
        weights = generator("cpu", "transformer", case.problem_seed)
        self.model = Decoder(case.config, generator=weights, device=device).to(dtype)
        drawn = generator("cpu", "transformer/tokens", case.problem_seed)
        size = case.batch, count
        self.tokens = torch.randint(case.vocabulary, size, generator=drawn).to(device)

    def warm_up(self) -> None:
        """Nothing: the check runs a step first."""

    def plan(self, case: TransformerCase) -> Plan:
        return plan(case.plan, case.depth)

    def in_dtype(self, dtype: torch.dtype) -> Decoder:
        """A copy of the dense model for a truth or a yardstick, with parameters in `dtype`."""
        return copy.deepcopy(self.model).to(dtype)


def parallel(case: TransformerCase, dense: Dense) -> TensorParallelDecoder:
    """The case's model, with the dense one's weights."""
    model = TensorParallelDecoder(
        case.config,
        plan=case.plan,
        reduce=case.reduce,
        vocabulary_parallel=case.vocabulary_parallel,
        checkpoint_blocks=case.checkpointed,
        device=dense.device,
    )
    model.load_full_state_dict(dense.model.state_dict())
    model.to(dense.model.embedding.weight.dtype)
    return compile_model(model) if case.compiled else model


def flat(state: dict[str, Tensor], names: list[str]) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([state[name].flatten() for name in names])
