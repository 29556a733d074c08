"""What the methods of one point share inside a rank: first weights, batches, and the truth.

The truth is a plain decoder that has the whole batch, sequence by sequence, with attention by its
definition, in float32 products (float64 for fp32 cases); the yardstick is the same in the case's
own dtype. The ranks compute both together (`dealt`), so they cost a rank no more where there are
many. A method that does not exchange gradients is held to its rank's part of the batch.
"""

import copy
import sysconfig
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from blockshock.distributed import collectives, noting
from blockshock.measure.errors import Yardstick, yardstick
from blockshock.phases import dealt
from blockshock.phases.data_parallel.case import DataParallelCase
from blockshock.sources import generator
from blockshock.transformer import Decoder

BATCHES = 8  # that are trained on in turn, where a case does not say more
STEPS = 3  # that are compared with those of the truth
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
MAX_NORM = 1.0


class Problem:
    """tokens [batches, ranks · batch, T + 1] on this rank's device; the same on every rank.

    model: the decoder with its first weights, to be copied.
    """

    def __init__(self, case: DataParallelCase, device: torch.device):
        self.case, self.device = case, device
        self.truth_dtype = torch.float64 if case.dtype == "fp32" else torch.float32
        if case.compiled:
            torch.compiler.reset()  # PyTorch keeps 8 compilations of a function, and then refuses
        self.rank = collectives.group_rank()
        self.model = Decoder(
            case.config,
            checkpoint_blocks=case.checkpointed,
            generator=generator("cpu", "data_parallel", case.problem_seed),
            device=device,
        )
        count = max(BATCHES, case.steps or 0)
        rows = count * case.ranks * case.batch
        self.tokens = read(case.text, rows * (case.T + 1)).view(count, -1, case.T + 1).to(device)
        self._truths, self._yardsticks = {}, {}

    def warm_up(self) -> None:
        """Nothing: the check runs a step first."""

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """What the decoder runs in for products in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def own(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets [batch, T] of a step."""
        rows = self._rows(step)
        return rows[:, :-1], rows[:, 1:]

    def _rows(self, step: int) -> Tensor:
        batch, rows = self.case.batch, self.tokens[step % len(self.tokens)]
        return rows[self.rank * batch : (self.rank + 1) * batch]

    @cached_property
    def entries(self) -> dict[str, int]:
        """Of each parameter how many, a tied one once, in the order of `flat`."""
        return {name: p.numel() for name, p in self.model.named_parameters()}

    @cached_property
    def start(self) -> Tensor:
        """The first weights as one vector."""
        return self.flat(self.model.state_dict())

    def flat(self, state: dict[str, Tensor]) -> Tensor:
        """The parameters of a whole state_dict as one vector."""
        return torch.cat([state[name].flatten() for name in self.entries])

    def gradient(self, *, whole: bool, cast: bool) -> tuple[Tensor, Yardstick]:
        """The true gradient at the first weights as one vector, and the yardstick.

        whole: of all ranks' sequences of the first step; else of this rank's. cast: the yardstick
        is of a model whose parameters, and so its residual stream, are bf16 in forward and
        backward.
        """
        return self._compared(whole, cast)[0]

    def update(self, *, cast: bool) -> tuple[Tensor, Yardstick]:
        """What STEPS true steps on all ranks' sequences change, and the yardstick."""
        return self._compared(True, cast)[1]

    @noting("computing the truth")
    def _compared(self, whole: bool, cast: bool) -> list[tuple[Tensor, Yardstick]]:
        if (whole, cast) not in self._yardsticks:
            if whole not in self._truths:
                self._truths[whole] = self._trained(self.truth_dtype, whole)
            plain = zip(
                self._trained(self.case.torch_dtype, whole, cast), self._truths[whole], strict=True
            )
            self._yardsticks[whole, cast] = [
                yardstick(own, truth, self.entries) for own, truth in plain
            ]
        return list(zip(self._truths[whole], self._yardsticks[whole, cast], strict=True))

    def _trained(self, dtype: torch.dtype, whole: bool, cast: bool = False) -> list[Tensor]:
        """The gradient at the first weights; then, where the phase trains, what steps change."""
        model = self._plain(dtype)
        self._backward(model, dtype, 0, whole, cast)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        if not whole or self.case.phase == "gradients":
            return [gradient]
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
        for step in range(STEPS):
            if step:
                optimizer.zero_grad()
                self._backward(model, dtype, step, whole, cast)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
        return [gradient, self.flat(model.state_dict()) - self.start]

    def _plain(self, dtype: torch.dtype) -> Decoder:
        """The decoder of a truth or yardstick: parameters in float32 at least."""
        model = copy.deepcopy(self.model)  # a new one would draw weights, for seconds
        for part in (model, *model.blocks):
            part.config = replace(self.case.config, attention="reference")
        return model.to(torch.promote_types(dtype, torch.float32))

    def _backward(
        self, model: Decoder, dtype: torch.dtype, step: int, whole: bool, cast: bool
    ) -> None:
        rows = self.tokens[step] if whole else self._rows(step)
        used = copy.deepcopy(model).bfloat16() if cast else model
        for row in dealt.own_rows(rows) if whole else rows.split(1):
            with self.autocast(dtype):
                loss = used(row[:, :-1], row[:, 1:])
            (loss / len(rows)).backward()
            if cast:  # bf16 would lose what a sum over many sequences adds
                for wide, narrow in zip(model.parameters(), used.parameters(), strict=True):
                    own = narrow.grad.to(wide.dtype)
                    wide.grad = own if wide.grad is None else wide.grad.add_(own)
                used.zero_grad()
        if whole:
            dealt.add_gradients(model.parameters())


def read(text: str, count: int) -> Tensor:
    """The first `count` bytes of a text as tokens, int64; a short text begins again.

    Raises:
        ValueError: a file that cannot be read, or is empty.
    """
    if text == "python":
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    else:
        files = [Path(text)]
    found = bytearray()
    for file in files:
        if len(found) >= count:
            break
        try:
            found += file.read_bytes()
        except OSError as error:
            raise ValueError(f"text {text!r} cannot be read: {error}") from None
    if not found:
        raise ValueError(f"text {text!r} is empty: name a file with text, or python")
    found *= -(-count // len(found))
    return torch.frombuffer(found, dtype=torch.uint8, count=count).long()
