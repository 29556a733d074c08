"""The training of a vision transformer under supermasks: AdamW under a cosine schedule.

    step s:  sparsity of the masks by the schedule
             for each of `accumulate` batches: mixed in pairs, cross-entropy / accumulate, backward
             gradients = mean over ranks; clip; AdamW at learning_rate(s); average of the weights

`runs.loop` says when the host waits for the device.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from blockshock.block_sparse import supermasks
from blockshock.runs.checkpoint import where_from
from blockshock.runs.device import autocast, to_device
from blockshock.runs.files import written_whole
from blockshock.runs.log import Log, memory_mib
from blockshock.runs.loop import check_finite, loop, only_here
from blockshock.runs.parallel import wrapped
from blockshock.runs.ranks import Ranks
from blockshock.runs.schedule import learning_rate
from blockshock.runs.settings import changes
from blockshock.vision import checkpoint
from blockshock.vision import config as settings
from blockshock.vision.augment import mix
from blockshock.vision.average import Average
from blockshock.vision.config import Config
from blockshock.vision.data import Source, sequences
from blockshock.vision.model import Schedule, accuracy, compiled, make

# seconds: of training, over all parts of a resumed run. loss and images_per_s are means over the
# steps since the row before; sparsity is the mean over the masks; top1 is of the average, if any.
COLUMNS = [
    *("step", "images", "loss", "top1", "val_loss", "sparsity", "lr", "grad_norm"),
    *("images_per_s", "seconds", "memory_mib"),
]
SHOWN = {
    "loss": ("loss", ".4f"),
    "images_per_s": ("images/s", ",.0f"),
    "sparsity": ("sparsity", ".3f"),
    "top1": ("top-1", ".2f"),
}


def train(
    config: Config,
    source: Source,
    ranks: Ranks,
    tell: Callable[[str], None],
    *,
    resume: bool = False,
    init_from: str | None = None,
) -> bool:
    """Trains to the last step, or until a signal; returns whether all steps are done.

    resume: goes on from the run's checkpoint, with the same bits as if it had never ended. That
    needs the same settings, ranks and libraries; settings that changed are told. init_from: begins
    at step 0 with the weights of a checkpoint (a file or a run's folder), the averaged ones if it
    has any; tiles are then scored by them.

    Raises:
        Refused: a checkpoint that is there without `resume`, is missing or does not fit; a run that
            another process trains; a loss that is not finite; a full disk.
    """
    with only_here(config.run, ranks):
        state = _starting_state(config, resume, init_from)
        if resume and state["step"] >= config.train.steps:
            tell(f"trained already: {state['step']} steps")
            return True
        run = Run(config, source, ranks, tell, weights=None if resume else state)
        if resume:
            for line in run.restore(state):
                tell(line)
        tell(run.about())
        ranks.by_first(run.open_log)
        try:
            done = loop(run, ranks, config.train, config.log.every)
        finally:
            if run.log:
                run.log.close()
        if not done:
            tell(
                f"stopped after step {run.step} of {config.train.steps}, checkpoint in "
                f"{config.run}; the same command with --resume goes on"
            )
    return done


class Run:
    """One training run on one rank: the model, its optimizer, and how far it is."""

    def __init__(
        self,
        config: Config,
        source: Source,
        ranks: Ranks,
        tell: Callable[[str], None],
        *,
        weights: dict[str, Any] | None = None,
    ):
        self.config, self.source, self.ranks = config, source, ranks
        self.step, self.position, self.seconds = 0, 0, 0.0
        self.log: Log | None = None
        options = config.train
        torch.manual_seed(options.seed + ranks.rank)
        module = self._made(tell, weights)
        groups = _groups(module, config)  # before a method makes pieces without a shape of them
        self.parameters = sum(p.numel() for p in module.parameters())
        self.model = wrapped(module, options, ranks.size)
        self.optimizer = self.model.optimizer(
            torch.optim.AdamW,
            groups,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=ranks.device.type == "cuda",
        )
        self.average = Average(module, options.average) if options.average else None
        self.schedule = Schedule(module, config.sparse, options.steps)
        self.norm = torch.zeros(())
        self._batches = None  # begins at `position`, which a checkpoint may change
        self.begin_window()

    def _made(self, tell: Callable[[str], None], weights: dict[str, Any] | None) -> nn.Module:
        model, report = make(self.config, self.ranks.device)
        if weights:
            _begin_with(model, weights["average"] or weights["model"])
        tell(str(report) if report else "no layer has a mask")
        return compiled(model, self.config)

    def open_log(self) -> None:
        """Writes the settings and opens the log."""
        with written_whole(Path(self.config.run) / "config.yaml") as out:
            out.write(settings.dump(self.config).encode())
        self.log = Log(self.config, COLUMNS, SHOWN, self.step)

    def about(self) -> str:
        """A line: the model, the ranks, the images of a step."""
        t, size = self.config.train, self.ranks.size
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        return (
            f"{self.parameters / 1e6:.1f} M parameters on {ranks} ({self.model.method}) on "
            f"{self.ranks.device.type}, {t.batch * t.accumulate * size} images a step, step "
            f"{self.step} of {t.steps}"
        )

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Goes on from a checkpoint; returns lines on what is not as it was."""
        self.model.load_full_state_dict(state["model"])
        self.model.load_full_optimizer_state(self.optimizer, state["optimizer"])
        self.step, self.position = state["step"], state["position"]
        self.seconds = state["seconds"]
        lines = [
            f"changed since the checkpoint: {key} = {value}, was {was}"
            for key, (was, value) in changes(state["config"], settings.to_dict(self.config)).items()
        ]
        if self.average:
            # Where no average was kept, it begins with the weights as they are.
            with self.average.in_place():
                self.model.load_full_state_dict(state["average"] or state["model"])
        if not checkpoint.restore_rng(state["rng"], self.ranks):
            lines.append(
                f"the checkpoint is of {len(state['rng'])} ranks, this run has {self.ranks.size}: "
                "images of a step differ from those of an uninterrupted run"
            )
        return lines

    def take_step(self) -> None:
        """One step of all ranks."""
        options, model, step = self.config.train, self.model, self.step + 1
        if self._batches is None:
            own = sequences(self.position, options.batch, self.ranks.rank, self.ranks.size)
            self._batches = self.source.training(own)
        rate = learning_rate(step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        self.schedule.set(step)
        for turn in range(options.accumulate):
            last = turn == options.accumulate - 1
            with nullcontext() if last else model.no_sync():
                loss = self._loss() / options.accumulate
                loss.backward()
            self.losses += loss.detach()
        model.finish_gradient_sync()
        self.norm = model.clip_grad_norm_(options.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        self.steps += 1
        if self.average:
            self.average.update(step)

    def _loss(self) -> torch.Tensor:
        """The mean cross-entropy of the next batch with its targets, in float32."""
        options = self.config.train
        images, labels = (to_device(part, self.ranks.device) for part in next(self._batches))
        seed = f"{options.seed} {self.position} {self.ranks.rank}"
        self.position += options.batch * self.ranks.size
        alphas = {"mixup": options.mixup, "cutmix": options.cutmix}
        images, targets = mix(images, labels, self.source.classes, **alphas, seed=seed)
        with autocast(options.autocast, self.ranks.device):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)

    def report(self, evaluating: bool) -> None:
        """Waits for the device, checks the loss, writes a row."""
        # Each rank has the same norm, so its mean is the norm.
        loss, norm = self.ranks.mean(torch.stack([self.losses / self.steps, self.norm.float()]))
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        check_finite(self.step, loss, norm)
        options, found = self.config.train, {}
        images = options.batch * options.accumulate * self.ranks.size * self.steps
        if evaluating:
            with self.average.in_place() if self.average else nullcontext():
                found = accuracy(self.model, self.source, self.config, self.ranks)
        sparsities = [layer.sparsity for _, layer in supermasks(self.model.module)]
        if self.log:
            self.log.row(
                step=self.step,
                images=self.position,
                loss=loss,
                top1=found.get("top1"),
                val_loss=found.get("loss"),
                sparsity=sum(sparsities) / len(sparsities) if sparsities else 0.0,
                lr=learning_rate(self.step, options),
                grad_norm=norm,
                images_per_s=images / seconds,
                seconds=self.seconds,
                memory_mib=memory_mib(self.ranks.device),
            )

    def begin_window(self) -> None:
        """The steps whose mean the next row tells begin here."""
        self.losses = torch.zeros((), device=self.ranks.device)
        self.steps, self.began = 0, time.perf_counter()

    def save(self) -> None:
        """Rank 0 writes; where it cannot, every rank raises."""
        state = {
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "model": self.model.full_state_dict(cpu=True),
            "average": None,
            "optimizer": self.model.full_optimizer_state(self.optimizer, cpu=True),
            "rng": self.ranks.gather(checkpoint.rng_state(self.ranks.device)),
            "config": settings.to_dict(self.config),
        }
        if self.average:
            with self.average.in_place():
                state["average"] = self.model.full_state_dict(cpu=True)
        path = Path(self.config.run) / checkpoint.NAME
        self.ranks.by_first(lambda: checkpoint.save(path, state))


def _starting_state(config: Config, resume: bool, init_from: str | None) -> dict[str, Any] | None:
    place = where_from(config.run, resume, init_from)
    if place is None:
        return None
    state = checkpoint.load(place)
    checkpoint.fits(state, settings.to_dict(config), masks=resume)
    return state


def _begin_with(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Loads the weights of a model with or without masks, and scores the tiles by them."""
    own = {name for name, _ in model.named_parameters() if not name.endswith(".scores")}
    model.load_state_dict({name: weights[name] for name in own}, strict=False)
    for _, layer in supermasks(model):
        layer.reset_scores()


def _groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Options of the optimizer by parameters' names. rate: times the learning rate."""
    groups: dict[str, list[str]] = {"matrices": [], "vectors": [], "scores": []}
    for name, p in module.named_parameters():
        if name.endswith(".scores"):
            groups["scores"].append(name)
        elif p.dim() < 2 or name in ("positions", "class_token"):
            groups["vectors"].append(name)
        else:
            groups["matrices"].append(name)
    options = {
        "matrices": {"rate": 1.0},
        "vectors": {"rate": 1.0, "weight_decay": 0.0},
        "scores": {"rate": config.sparse.lr, "weight_decay": 0.0},
    }
    return [{"names": names, **options[kind]} for kind, names in groups.items() if names]
