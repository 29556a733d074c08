"""What sparsity costs: validation accuracy of trained models, over the seeds of one recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tools.cases import Result, Results, grouped
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.looks import line_style
from tools.drawing.render import lines
from tools.drawing.series import Words
from tools.families.block_sparse.points import DENSE, of_phase, shape

TOP1 = "top-1 accuracy, %"


@dataclass(frozen=True)
class Trained:
    """The runs of one method and sparsity under one recipe, by seed, and the dense ones."""

    runs: dict[int, Result]
    dense: dict[int, Result]

    @property
    def first(self) -> Result:
        return next(iter(self.runs.values()))

    @property
    def method(self) -> str:
        return self.first.case.method

    @property
    def sparsity(self) -> float:
        return self.first.case.sparsity

    @property
    def top1(self) -> list[float]:
        """Accuracies in percent, one a seed."""
        return [run.rates["top1"] for run in self.runs.values()]

    @property
    def below(self) -> float | None:
        """Points below dense, means over seeds; None where the seeds are not the same."""
        if not self.dense or self.dense.keys() != self.runs.keys():
            return None
        return fmean(run.rates["top1"] for run in self.dense.values()) - fmean(self.top1)


def trained(results: Results) -> list[list[Trained]]:
    """The models of each recipe: dense first, then by method and sparsity."""
    found = [r for r in of_phase(results, "study") if "top1" in r.rates]
    made = []
    for here in grouped(found, _recipe).values():
        kinds = grouped(here, lambda r: (r.line_order, r.case.sparsity))
        runs = [{r.case.seed: r for r in kind} for _, kind in sorted(kinds.items())]
        dense = next((own for own in runs if _method(own) == DENSE), {})
        made.append([Trained(own, dense) for own in runs])
    return made


def recipe_words(models: Sequence[Trained]) -> str:
    """What was trained: digits, 1000 steps of 64 images, block 16, seeds 0, 1, 2."""
    case = models[0].first.case
    seeds = sorted({seed for one in models for seed in one.runs})
    told = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    return f"{shape(case)}, {case.steps} steps of {case.B} images, block {case.block}, {told}"


def accuracy_vs_sparsity(results: Results) -> list[Drawing]:
    """Top-1 against sparsity, a line for each form of the model."""
    words = Words(
        "block_sparse_study_accuracy",
        "Models trained under supermasks: accuracy against sparsity",
        "Top-1 on the validation images, alike but for the sparsity of the MLPs: the mean over "
        "seeds, with the lowest and the highest. supermask: masks folded into dense layers; the "
        "others hold what is kept in that storage. Grey: the dense model's mean. Higher is better.",
    )
    groups = {recipe_words(models): models for models in trained(results)}
    drawings = []
    for text, models in groups.items():
        dense = [one for one in models if one.method == DENSE]
        rule = fmean(dense[0].top1) if dense else None
        made = []
        for method, own in grouped_by_method(models).items():
            points = tuple(_point(one) for one in own)
            made.append(Line(method, points, line_style(own[0].first)))
        panel = Panel("", tuple(made), "sparsity", Axis(TOP1, "{:.2f}".format, "even", rule))
        if len({p.x for line in made for p in line.points}) > 1:
            options = {"height": 3.6, "draw": _even}
            drawings.append(series.drawn(results, words, text, groups, [panel], **options))
    if not drawings:
        raise Absent("accuracies of models of two sparsities are needed")
    return drawings


def grouped_by_method(models: Sequence[Trained]) -> dict[str, list[Trained]]:
    """The models of each form, by sparsity."""
    found: dict[str, list[Trained]] = {}
    for one in sorted(models, key=lambda m: m.sparsity):
        found.setdefault(one.method, []).append(one)
    return dict(sorted(found.items(), key=lambda item: item[1][0].first.line_order))


def _even(axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """Lines on even axes."""
    spots = lines(axes, Panel("", panel.lines, "step", panel.y), ids)
    axes.set_xticks(sorted({p.x for line in panel.lines for p in line.points}))
    axes.set_xlabel("sparsity of the MLPs")
    axes.set_ylabel(panel.y.label)
    axes.margins(0.08)
    axes.grid(axis="x", color=style.GRID)
    return spots


def _point(one: Trained) -> Point:
    mean, found = fmean(one.top1), one.top1
    ends = (min(found), max(found)) if len(found) > 1 else (None, None)
    return Point(one.sparsity, mean, *ends)


def _method(runs: dict[int, Result]) -> str:
    return next(iter(runs.values())).case.method


def _recipe(result: Result) -> tuple:
    return (result.case.recipe, result.case.block, result.case.steps, result.setting)


FIGURES = {"block_sparse_study_accuracy": accuracy_vs_sparsity}
