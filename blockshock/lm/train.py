"""The training loop: AdamW on the mean gradient of all ranks, under a cosine schedule.

    step s:  for each of `accumulate` batches: loss / accumulate, backward (sent with the last one)
             gradients = mean over ranks; clip; AdamW at learning_rate(s)

`runs.loop` says when the host waits for the device.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from blockshock.lm import checkpoint, record
from blockshock.lm import config as settings
from blockshock.lm.config import Config
from blockshock.lm.log import open_log, peak_flops
from blockshock.lm.model import decoder_config, make, mean_loss
from blockshock.lm.prepare import Prepared
from blockshock.lm.tokens import Batches, check_size
from blockshock.lm.whole import put, whole
from blockshock.runs.checkpoint import where_from
from blockshock.runs.device import autocast, to_device
from blockshock.runs.files import written_whole
from blockshock.runs.log import Log, memory_mib
from blockshock.runs.loop import check_finite, loop, only_here
from blockshock.runs.parallel import wrapped
from blockshock.runs.ranks import Ranks
from blockshock.runs.schedule import learning_rate
from blockshock.runs.settings import Refused, changes
from blockshock.transformer import counts

APART = 1e-4  # relative difference of replicas: thousands of float32 roundings


def train(
    config: Config,
    data: Prepared,
    ranks: Ranks,
    tell: Callable[[str], None],
    *,
    resume: bool = False,
    init_from: str | None = None,
    skip_data: int = 0,
) -> bool:
    """Trains to the last step, or until a signal; returns whether all steps are done.

    resume: goes on from the run's checkpoint, with the same bits as if it had never ended. That
    needs the same settings, ranks and libraries; settings that changed are told. init_from: begins
    at step 0 with the weights of a checkpoint (a file or a run's folder). skip_data: leaves out so
    many sequences of the data from where it stands.

    Raises:
        Refused: a checkpoint that is there without `resume`, is missing or does not fit; a run that
            another process trains; too little data; a loss that is not finite; a full disk.
    """
    with only_here(config.run, ranks):
        return _train(config, data, ranks, tell, resume, init_from, skip_data)


def _train(
    config: Config,
    data: Prepared,
    ranks: Ranks,
    tell: Callable[[str], None],
    resume: bool,
    init_from: str | None,
    skip_data: int,
) -> bool:
    folder = Path(config.run)
    state = _starting_state(config, data, resume, init_from)
    if resume and state["step"] >= config.train.steps:
        tell(f"trained already: {state['step']} steps")
        return True
    run = Run(config, data, ranks)
    if resume:
        for line in run.restore(state):
            tell(line)
    elif state:
        put(run.model, state["model"])
    run.position += skip_data
    run.choices |= {"init_from": init_from, "skip_data": skip_data}
    tell(run.about())
    ranks.by_first(run.open_log)
    try:
        done = loop(run, ranks, config.train, config.log.every)
    finally:
        if run.log:
            run.log.close()
    if not done:
        tell(
            f"stopped after step {run.step} of {config.train.steps}, checkpoint in {folder}; the "
            "same command with --resume goes on"
        )
    return done


class Run:
    """One training run on one rank: the model, its optimizer, and how far it is."""

    def __init__(self, config: Config, data: Prepared, ranks: Ranks):
        self.config, self.data, self.ranks = config, data, ranks
        self.step, self.position, self.seconds = 0, 0, 0.0
        self.log: Log | None = None
        self.choices: dict[str, Any] = {"changed": {}}  # of this start, for `record`
        options = config.train
        self.batches = Batches(
            data.train,
            context=config.model.context,
            batch=options.batch,
            seed=options.seed,
            rank=ranks.data_rank,
            ranks=ranks.data_size,
        )
        # Asked for before the first step, not after the last.
        check_size(data.validation, config.model.context, options.batch, ranks.data_size)
        torch.manual_seed(options.seed + ranks.data_rank)
        module = make(config, ranks)
        vectors = _vectors(module)  # asked before a method cuts the parameters into flat pieces
        self.model = wrapped(module, options, ranks.data_size, ranks.data)
        self.optimizer = self.model.optimizer(
            torch.optim.AdamW,
            [{"names": vectors, "weight_decay": 0.0}],
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=ranks.device.type == "cuda",
        )
        self.counts = counts(decoder_config(config))
        self.peak = peak_flops(config, ranks.device)
        self.norm = torch.zeros(())
        self.begin_window()

    def open_log(self) -> None:
        """Writes the settings and what else is told of the run, and opens the log."""
        with written_whole(Path(self.config.run) / "config.yaml") as out:
            out.write(settings.dump(self.config).encode())
        record.write(self.config, self.data, self.ranks, self.step, self.choices)
        self.log = open_log(self.config, self.step)

    def about(self) -> str:
        """A line: the model, the ranks, the tokens of a step."""
        t, sizes = self.config.train, self.counts
        tokens = self.config.model.context * t.batch * t.accumulate * self.ranks.data_size
        ranks = "1 rank" if self.ranks.size == 1 else f"{self.ranks.size} ranks"
        if self.ranks.tensor_size > 1:
            plan = self.model.module.plan
            ranks += (
                f", {self.ranks.tensor_size} hold a model: plan {plan.name}, {plan.syncs} syncs"
            )
        return (
            f"{sizes.parameters / 1e6:.1f} M parameters, {ranks} "
            f"({self.model.method}) on {self.ranks.device.type}, {tokens} tokens a step, step "
            f"{self.step} of {t.steps}"
        )

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Goes on from a checkpoint; returns lines on what is not as it was."""
        put(self.model, state["model"], self.optimizer, state["optimizer"])
        self.step, self.position = state["step"], state["position"]
        self.seconds = state["seconds"]
        changed = changes(state["config"], settings.to_dict(self.config))
        self.choices["changed"] = {key: was for key, (was, _) in changed.items()}
        lines = [
            f"changed since the checkpoint: {key} = {value}, was {was}"
            for key, (was, value) in changed.items()
        ]
        if not checkpoint.restore_rng(state["rng"], self.ranks):
            lines.append(
                f"the checkpoint is of {len(state['rng'])} ranks, this run has {self.ranks.size}: "
                "tokens of a step and random numbers differ from those of an uninterrupted run"
            )
        return lines

    def take_step(self) -> None:
        """One step of all ranks."""
        options, model = self.config.train, self.model
        rate = learning_rate(self.step + 1, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for turn in range(options.accumulate):
            x, y = (to_device(t, self.ranks.device) for t in self.batches.at(self.position))
            self.position += options.batch * self.ranks.data_size
            last = turn == options.accumulate - 1
            with nullcontext() if last else model.no_sync():
                with autocast(options.autocast, self.ranks.device):
                    loss = model(x, y) / options.accumulate
                loss.backward()
            self.losses += loss.detach()
        model.finish_gradient_sync()
        self.norm = model.clip_grad_norm_(options.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.steps += 1

    def report(self, evaluating: bool) -> None:
        """Waits for the device, checks the loss, writes a row."""
        # Each rank has the same norm, so its mean is the norm.
        loss, norm = self.ranks.mean(torch.stack([self.losses / self.steps, self.norm.float()]))
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        check_finite(self.step, loss, norm)
        options, context = self.config.train, self.config.model.context
        sequences = options.batch * options.accumulate * self.ranks.data_size * self.steps
        rate = sequences * context / seconds
        value = None
        if evaluating:
            batches = options.evaluate_batches
            found = mean_loss(self.model, self.data.validation, self.config, self.ranks, batches)
            value = found["loss"]
        if self.log:
            mfu = None
            if self.peak:
                mfu = rate * self.counts.flops_per_token / (self.peak * self.ranks.size)
            self.log.row(
                step=self.step,
                tokens=self.position * context,
                loss=loss,
                val_loss=value,
                lr=learning_rate(self.step, options),
                grad_norm=norm,
                tokens_per_s=rate,
                mfu=mfu,
                seconds=self.seconds,
                memory_mib=memory_mib(self.ranks.device),
            )

    def begin_window(self) -> None:
        """The steps whose mean the next row tells begin here."""
        self.losses = torch.zeros((), device=self.ranks.device)
        self.steps, self.began = 0, time.perf_counter()

    def save(self) -> None:
        """Rank 0 writes; where it cannot, every rank raises."""
        self._check_replicas()
        weights, optimizer = whole(self.model, self.optimizer)
        state = {
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "model": weights,
            "optimizer": optimizer,
            "rng": self.ranks.gather(checkpoint.rng_state(self.ranks.device)),
            "config": settings.to_dict(self.config),
            "tokenizer": self.data.digest,
        }
        path = Path(self.config.run) / checkpoint.NAME
        self.ranks.by_first(lambda: checkpoint.save(path, state))

    def _check_replicas(self) -> None:
        """Sums in another order may differ in the last bits; more is a model that fell apart."""
        module = self.model.module
        apart = module.replicas_apart() if self.ranks.tensor_size > 1 else 0.0
        if not apart <= APART:
            raise Refused(
                f"step {self.step}: what all tensor-parallel ranks hold is {apart:.1e} apart, "
                f"relative, and at most {APART:g} can be rounding. A checkpoint that was written "
                "before is kept; --resume from it"
            )


def _starting_state(
    config: Config, data: Prepared, resume: bool, init_from: str | None
) -> dict[str, Any] | None:
    place = where_from(config.run, resume, init_from)
    if place is None:
        return None
    state = checkpoint.load(place)
    model = settings.to_dict(config)["model"]
    checkpoint.fits(state, model, config.data.vocabulary, data.digest, goes_on=resume)
    return state


def _vectors(model: torch.nn.Module) -> list[str]:
    """Parameters without weight decay: the norms' scales."""
    return [name for name, p in model.named_parameters() if p.dim() < 2]
