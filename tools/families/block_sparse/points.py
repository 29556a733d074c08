"""Results of block-sparse layers: what they are called, which stand at one point, their ratios.

A point is a layer or a model with its rows, tiles, sparsity and setting. `dense` multiplies by the
same weight with its zeros in it, and `torch_bsr` is PyTorch's own BSR.
"""

from collections.abc import Iterable, Sequence

from tools.cases import Case, Naming, Result, Results, grouped, over
from tools.stats import Interval

PHASES = {
    "forward": "layer, forward",
    "backward": "layer, forward and backward",
    "planning": "planning of a mask",
    "model": "vision transformer, inference",
    "supermask": "vision transformer, training step",
    "study": "accuracy of trained models",
}
DENSE, TORCH, OURS = "dense", "torch_bsr", "bsr"
OF_MODELS = ("model", "supermask", "study")
SIZES = ("N", "K", "B")
SQUARE = (8192, 8192)
MLPS = {  # of vision transformers: [N, K] of up and of down
    "ViT-B": ((3072, 768), (768, 3072)),
    "ViT-L": ((4096, 1024), (1024, 4096)),
    "ViT-H": ((5120, 1280), (1280, 5120)),
}


def setting(case: Case) -> str:
    """What the methods of one figure share beside sizes, tiles and sparsity, in words."""
    parts = [case.dtype or ""]
    parts += [f"with {case.activation}"] if case.activation else []
    parts += ["no bias"] * (case.bias is False)
    parts += ["compiled"] * bool(case.compiled)
    parts += [case.attention] if case.attention else []
    parts += [f"seed {case.seed}"] if case.seed and case.phase != "study" else []
    return ", ".join(part for part in parts if part)


NAMING = Naming(
    methods={
        "dense": ("#0072b2", "o"),
        "torch_bsr": ("#e69f00", "v"),
        "bsr": ("#009e73", "h"),
        "semi_structured": ("#cc79a7", "D"),
        "plan": ("#7a7f87", "s"),
        "supermask": ("#d55e00", "P"),
    },
    phases=("correctness", *PHASES),
    sizes=SIZES,
    setting=setting,
)


def place(case: Case) -> tuple:
    """Which layer or model: equal for the methods of a point, and the seeds of a study."""
    sizes = tuple(getattr(case, name) for name in SIZES)
    more = (case.depth or 0, case.image or 0, case.block or 0, case.sparsity or 0, case.steps or 0)
    return (*sizes, *more, case.recipe or "", setting(case))


def shape(case: Case) -> str:
    """The layer or the model in words: its label, or its sizes."""
    if case.shape:
        return str(case.shape)
    return f"{case.K}×{case.depth}" if case.phase in OF_MODELS else f"{case.N}×{case.K}"


def where(case: Case) -> str:
    """A point in words: 8192 square, 4096 rows, block 64, s = 0.9."""
    rows = "images" if case.phase in OF_MODELS else "rows"
    return f"{shape(case)}, {case.B} {rows}, block {case.block}, s = {case.sparsity:g}"


def of_phase(results: Results, phase: str) -> list[Result]:
    """The results of a phase, methods in reading order."""
    return sorted(results.of(phase), key=lambda r: (place(r.case), r.line_order, r.id))


def by_place(found: Iterable[Result]) -> dict[tuple, list[Result]]:
    """The results of each point, small layers first."""
    groups = grouped(found, lambda result: place(result.case))
    return {key: groups[key] for key in sorted(groups)}


def of_method(method: str, here: Iterable[Result]) -> Result | None:
    """The result of a method at a point; None where it was not measured."""
    return next((r for r in here if r.case.method == method), None)


def speed(result: Result, here: Sequence[Result], reference: str = DENSE) -> Interval | None:
    """Time of another method of its point over that of a result, above 1 it is the faster; None
    without the other, or of itself.
    """
    other = of_method(reference, here)
    return None if other in (None, result) else over(other, result)


def planning_share(here: Sequence[Result]) -> Interval | None:
    """Time of a plan over that of the product by it."""
    both = of_method("plan", here), of_method(OURS, here)
    return None if None in both else over(*both)


def step_ratio(here: Sequence[Result]) -> Interval | None:
    """Time of a training step with supermasks over that of a dense one."""
    both = of_method("supermask", here), of_method(DENSE, here)
    return None if None in both else over(*both)
