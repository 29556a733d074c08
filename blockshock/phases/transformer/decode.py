"""One token through a decoder under a sync plan, with a cache of keys and values before it.

The cache holds T tokens, the new one included. What stands in it is random: a step costs the same
whatever it says, and the truth has the same. Checked before it is timed: the token's logits,
against one process that simulates the plan's ranks (`simulation`).

    floor = the larger of (the rank's weights and its part of the cache, read once) and of the sums
"""

import torch
from torch import Tensor

from blockshock.distributed import collectives, noting
from blockshock.measure.errors import Figure, both_errors, figure
from blockshock.measure.floor import all_reduce_wire
from blockshock.measure.regions import region
from blockshock.phases.experiment import Experiment
from blockshock.phases.transformer import simulation
from blockshock.phases.transformer.case import TransformerCase
from blockshock.phases.transformer.decoders import Dense, paths
from blockshock.sources import generator

SAME = 1e-5  # a relative error that passes in fp32: sums in another order


class Problem(Dense):
    """First weights in the case's dtype, one token [batch, 1], and what the cache holds."""

    def __init__(self, case: TransformerCase, device: torch.device):
        super().__init__(case, device, case.torch_dtype, 1)
        self._truths: dict[str, tuple[Tensor, float, float]] = {}

    def cache(self, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens but the new one: [batch, kv_heads, T - 1, D].

        Drawn at each call: the caches of all blocks are large.
        """
        case, config = self.case, self.case.config
        drawn = generator(self.device, "transformer/cache", case.problem_seed, block)
        size = 2, case.batch, config.kv_heads, case.T - 1, config.head_width
        found = torch.randn(size, generator=drawn, device=self.device).to(case.torch_dtype)
        return found[0], found[1]

    @torch.no_grad()
    @noting("computing the truth")
    def truth(self, case: TransformerCase) -> tuple[Tensor, float, float]:
        """The true logits [batch, vocabulary], and the yardstick's two errors."""
        if case.plan not in self._truths:
            true = self._simulated(case, self.truth_dtype)
            plain = self._simulated(case, case.torch_dtype)
            self._truths[case.plan] = true, *both_errors(plain, true)
        return self._truths[case.plan]

    def _simulated(self, case: TransformerCase, dtype: torch.dtype) -> Tensor:
        caches = [tuple(x.to(dtype) for x in self.cache(i)) for i in range(case.depth)]
        model = self.in_dtype(dtype)
        return simulation.logits(model, self.plan(case), self.ranks, self.tokens, caches)[:, 0]


class Run:
    """The parallel decoder with this rank's part of the cache."""

    def __init__(self, case: TransformerCase, problem: Problem):
        self.case, self.problem = case, problem
        self.model = problem.parallel(case)
        if case.compiled:
            self.model.compile_decoding()
        self.caches = self.model.cache(case.batch, case.T)
        heads = case.config.kv_heads // problem.ranks
        own = slice(collectives.group_rank() * heads, (collectives.group_rank() + 1) * heads)
        for block, kept in enumerate(self.caches.blocks):
            for part, whole in zip(kept, problem.cache(block), strict=True):
                part[:, :, :-1] = whole[:, own]

    @torch.no_grad()
    def step(self) -> Tensor:
        """The logits [batch, vocabulary] of the token in the last place of the cache."""
        with region("forward"):
            return self.model.decode_step(self.problem.tokens, self.caches, self.case.T - 1)


def decode(case: TransformerCase, run: Run, problem: Problem) -> Experiment:
    """A token of each sequence through the decoder, with a cache of the T - 1 before it."""

    def check() -> dict[str, Figure]:
        found = run.step()
        experiment.replicated["output"] = found
        enough = SAME if case.dtype == "fp32" else 0.0
        return {"output": figure(found, *problem.truth(case), ranks=case.ranks, enough=enough)}

    experiment = Experiment(run.step, check, "forward")
    return experiment


def figures(case: TransformerCase, run: Run, problem: Problem, experiment, ceilings) -> dict:
    """For the result: memory, floor, paths, the plan's syncs."""
    weights = sum(p.nbytes for p in run.model.parameters())
    cache = sum(x.nbytes for kept in run.caches.blocks for x in kept)
    read = weights + cache
    if not case.config.tied:  # of an embedding that is no head as well, a row a sequence is read
        read -= run.model.embedding.weight.nbytes
    floor = None
    if ceilings is not None:
        stream = case.batch * case.width * case.torch_dtype.itemsize
        wire = problem.plan(case).syncs * all_reduce_wire(stream, case.ranks)
        terms = {
            "compute": 0.0,
            "memory": read / ceilings["copy_bytes_per_s"],
            "wire": wire / ceilings["link_bytes_per_s"] if wire else 0.0,
        }
        floor = {"seconds": max(terms.values()), **terms}
    return {
        "memory": {"weight_bytes": weights, "cache_bytes": cache},
        "floor": floor,
        "paths": paths(case, run.model, case.batch),
        "model": {"syncs": problem.plan(case).syncs, "read_bytes": read},
    }


def rates(case: TransformerCase, seconds: float, outcome: dict) -> dict:
    """Tokens a second of all sequences; the plan's syncs; the rate of reading."""
    model = outcome["model"]
    return {
        "syncs": model["syncs"],
        "tokens_per_s": case.batch / seconds,
        "read_bytes_per_s": model["read_bytes"] / seconds,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }
