"""A training step of a vision transformer: dense, or with its MLPs under supermasks.

One sample is a forward, a backward and AdamW. The scores of the tiles train with the weights, and
the masks are found anew in every forward.

Checked before it is timed: the logits, and the gradient of every weight and every score, against
the same model of dense layers with masked weights W ∘ m and plain attention. With G the gradient of
such a weight, that of W is G ∘ m, and that of a score the sum of G ∘ W over its tile.

    floor = the larger of arithmetic (6 operations a multiplied weight and token, and attention) and
            of the optimizer's traffic
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.block_sparse import Settings, apply_supermask, supermasks, tiles
from blockshock.measure.errors import Figure, figure, relative_error
from blockshock.measure.floor import OPTIMIZER_PASSES
from blockshock.measure.regions import region
from blockshock.phases.block_sparse import models
from blockshock.phases.block_sparse.case import CLASSES, BlockSparseCase
from blockshock.phases.experiment import Experiment
from blockshock.sources import generator
from blockshock.transformer.vision import compile_vision

OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
SKIP = ("*.qkv", "*.out", "last_layer")  # stay dense
PART = 16  # images that the truth is computed for at once


class Problem(models.Drawn):
    """The model with its first weights, images, and their labels int64 [B]."""

    def __init__(self, case: BlockSparseCase, device: torch.device):
        super().__init__(case, device)
        drawn = generator("cpu", "block_sparse/labels", case.problem_seed)
        self.labels = torch.randint(CLASSES, (case.B,), generator=drawn).to(device)
        self._truths: dict[bool, dict[str, tuple[Tensor, float]]] = {}

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """What a model runs in for products in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def truth(self, masked: bool) -> dict[str, tuple[Tensor, float]]:
        """By result: the true one, and the yardstick's error."""
        if masked not in self._truths:
            self._truths.clear()  # gradients of a whole model are large
            dtypes = self.truth_dtype, self.case.torch_dtype
            true, plain = (self._dense(masked, dtype) for dtype in dtypes)
            found = {name: (true[name], relative_error(plain[name], true[name])) for name in true}
            self._truths[masked] = found
        return self._truths[masked]

    def _dense(self, masked: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logits, gradients of all weights as one vector, and those of the scores."""
        model = self.plain(torch.promote_types(dtype, torch.float32))
        covered = models.mlp_weights(model) if masked else []
        first = [weight.detach().clone() for weight in covered]
        square, kept = (self.case.block, self.case.block), []
        with torch.no_grad():
            for weight in covered:
                scores = tiles.magnitude(weight, square)
                kept.append(tiles.keep_top(scores, self.case.sparsity))
                weight.copy_(tiles.masked(weight, kept[-1], square))
        logits = []
        for images, labels in zip(self.images.split(PART), self.labels.split(PART), strict=True):
            with self.autocast(dtype):
                out = model(images.to(torch.promote_types(dtype, torch.float32)))
            logits.append(out.detach())
            loss(out, labels, self.case.B).backward()
        scores = []
        for weight, was, mask in zip(covered, first, kept, strict=True):
            scores.append(tiles.tile_sums(weight.grad * was, square))
            weight.grad = tiles.masked(weight.grad, mask, square)
        found = {"output": torch.cat(logits), "gradient": _flat(model.parameters())}
        return found | ({"scores": torch.cat([s.flatten() for s in scores])} if masked else {})


class Run:
    """The model and its optimizer."""

    def __init__(self, case: BlockSparseCase, problem: Problem):
        self.case, self.problem = case, problem
        self.model = copy.deepcopy(problem.model)
        if case.method == "supermask":
            settings = Settings(block=case.block, sparsity=case.sparsity)
            apply_supermask(self.model, linear=settings, skip=SKIP)
        self.scores = [layer.scores for _, layer in supermasks(self.model)]
        if case.compiled:
            compile_vision(self.model)
        fused = problem.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters(), fused=fused, **OPTIMIZER)

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return list(self.model.parameters())

    def backward(self) -> Tensor:
        """The gradients of the whole batch; returns the logits."""
        with region("forward"):
            with self.problem.autocast(self.case.torch_dtype):
                logits = self.model(self.problem.images)
            mean = loss(logits, self.problem.labels, self.case.B)
        with region("backward"):
            mean.backward()
        return logits.detach()

    def step(self) -> None:
        """A training step."""
        self.backward()
        with region("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()


build = Run


def supermask(case: BlockSparseCase, run: Run, problem: Problem) -> Experiment:
    """A training step of the model: forward, backward, AdamW."""

    def check() -> dict[str, Figure]:
        found = {"output": run.backward()}
        of_scores = {id(scores) for scores in run.scores}
        found["gradient"] = _flat(p for p in run.parameters() if id(p) not in of_scores)
        if run.scores:
            found["scores"] = _flat(run.scores)
        run.optimizer.zero_grad()
        enough = models.SAME if case.dtype == "fp32" else 0.0
        truth = problem.truth(bool(run.scores))
        return {
            name: figure(found[name], *true, bound=models.BOUND, enough=enough)
            for name, true in truth.items()
        }

    size = sum(p.nbytes for p in run.parameters())
    return Experiment(run.step, check, "training", trained_bytes=size)


def figures(case: BlockSparseCase, run: Run, problem: Problem, experiment, ceilings) -> dict:
    """For the result: memory, work, floor, paths."""
    flops, floor = 3 * models.forward_flops(case, problem.model), None
    if ceilings is not None:
        moved = (1 + OPTIMIZER_PASSES["adam"]) * experiment.trained_bytes
        terms = {
            "compute": flops / ceilings["matrix_flops"][case.dtype],
            "memory": moved / ceilings["copy_bytes_per_s"],
            "wire": 0.0,
        }
        floor = {"seconds": max(terms.values()), **terms}
    state = [x for one in run.optimizer.state.values() for x in one.values()]
    return {
        "memory": {
            "weight_bytes": experiment.trained_bytes,
            "optimizer_bytes": sum(x.nbytes for x in state if isinstance(x, Tensor)),
        },
        "work": {"dense_flops": flops},
        "floor": floor,
        "paths": {"attention": case.config.attention_on(problem.device.type)},
    }


rates = models.rates


def loss(logits: Tensor, labels: Tensor, images: int) -> Tensor:
    """The cross-entropy of some images as their share of the mean over all of them."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="sum") / images


def _flat(parameters) -> Tensor:
    """Their gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in parameters])
