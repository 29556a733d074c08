"""What fewer syncs cost: validation losses of models that were trained under each plan.

Runs with the same recipe (all settings but the plan and the seed) stand together, and a plan is
compared with BASELINE at the same seeds.

    above = loss of the plan / loss of the baseline − 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from tools.cases import Result, Results, grouped
from tools.families.transformer.points import (
    BASELINE,
    by_place,
    evenly,
    model,
    of_phase,
    plan_words,
)
from tools.tables import count

WITHIN = 0.02  # above the baseline's loss, where a plan still counts as good


@dataclass(frozen=True)
class Trained:
    """The runs of one plan under one recipe, by seed, and those of the baseline."""

    runs: dict[int, Result]
    standard: dict[int, Result]

    @property
    def first(self) -> Result:
        return next(iter(self.runs.values()))

    @property
    def is_standard(self) -> bool:
        return self.runs == self.standard

    @property
    def words(self) -> str:
        """The plan: 12 syncs."""
        return plan_words(self.first)

    @property
    def syncs(self) -> float:
        return self.first.rates["syncs"]

    @property
    def evenly(self) -> bool:
        return evenly(self.first)

    @property
    def losses(self) -> list[float]:
        """The last validation losses, one a seed."""
        return [run.rates["val_loss"] for run in self.runs.values()]

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def above(self) -> list[float]:
        """Above the baseline's loss, for each seed that both were trained with."""
        return [
            run.rates["val_loss"] / self.standard[seed].rates["val_loss"] - 1
            for seed, run in self.runs.items()
            if seed in self.standard
        ]

    @property
    def noise(self) -> float | None:
        """Standard deviation of the losses over seeds, as a share of them; None of one seed."""
        return stdev(self.losses) / self.loss if len(self.runs) > 1 else None

    @property
    def speed(self) -> float | None:
        """Tokens a second over the baseline's; None where a run of either has no speed."""
        both = [rate(runs) for runs in (self.runs, self.standard)]
        return None if None in both else both[0] / both[1]

    def curve(self) -> dict[float, list[float]]:
        """Step -> validation losses, one a seed, at steps that every run has."""
        curves = [
            dict(zip(run.curves["val_step"], run.curves["val_loss"], strict=True))
            for run in self.runs.values()
        ]
        common = [step for step in curves[0] if all(step in curve for curve in curves)]
        return {step: [curve[step] for curve in curves] for step in common}


def rate(runs: dict[int, Result]) -> float | None:
    """The mean tokens a second of the runs, None where one has no speed, or there is none."""
    found = [run.rates.get("tokens_per_s") for run in runs.values()]
    return None if None in found or not found else fmean(found)


def trained(results: Results) -> list[list[Trained]]:
    """The plans of each recipe, the one with the most syncs first; recipes with the most tokens
    first.
    """
    found = [r for r in of_phase(results, "study") if "val_loss" in r.rates and "syncs" in r.rates]
    made = []
    for here in by_place(found).values():
        plans = grouped(here, lambda r: r.case.method)
        runs = {name: {r.case.seed: r for r in plan} for name, plan in plans.items()}
        standard = runs.get(BASELINE, {})
        plans = [Trained(own, standard) for own in runs.values()]
        made.append(sorted(plans, key=lambda one: (-one.syncs, one.words)))
    return sorted(made, key=lambda plans: (-_tokens(plans), -len(plans)))


def recipe_words(plans: Sequence[Trained]) -> str:
    """What was trained, and for how long: 768×12, 1000 steps of 131 k tokens."""
    case = plans[0].first.case
    return f"{model(case)}, {case.steps} steps of {count(case.batch * case.T)} tokens"


def _tokens(plans: Sequence[Trained]) -> int:
    case = plans[0].first.case
    return case.steps * case.batch * case.T
