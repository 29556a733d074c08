"""Data-parallel results: the model that each trained, and what it is compared with.

    scaling efficiency    time of NONE over time of the method: both train as many tokens a rank
    communication         1 − that, of gradients alone: what of the exchange is not hidden

NONE exchanges nothing, so it is one rank's speed, measured in the same rounds.
"""

from collections.abc import Sequence

from tools.cases import Case, Naming, Result, Results, grouped, over
from tools.stats import Interval

PHASES = {
    "gradients": "gradients",
    "training": "training step",
    "lm": "language model",
}
NONE, PEER = "none", "torch_ddp"
SIZES = ("width", "depth", "batch", "T")
OPENWEBTEXT = 9_035_582_198  # tokens of its training part, GPT-2's vocabulary (nanoGPT)


def setting(case: Case) -> str:
    """What the methods of one figure share beside sizes and attention, in words."""
    parts = [case.dtype or ""]
    parts += [f"{case.ranks} rank" + "s" * (case.ranks != 1)] if case.ranks else []
    parts += ["compiled"] * bool(case.compiled) + ["checkpointed"] * bool(case.checkpointed)
    known = {"vocabulary": 50304, "text": "python", "seed": 0}
    for name, usual in known.items():
        value = getattr(case, name)
        parts += [f"{name} {value}"] if value not in (None, usual) else []
    return ", ".join(parts)


def run_label(result: Result) -> str:
    """As `case.label` of the run: overlapped-5MiB."""
    unusual = result.unusual
    parts = [result.case.method]
    parts += [f"{unusual['bucket_mib']}MiB"] if "bucket_mib" in unusual else []
    parts += [f"compute={unusual['compute_dtype']}"] if "compute_dtype" in unusual else []
    return "-".join(parts)


NAMING = Naming(
    methods={
        "none": ("#7a7f87", "s"),
        "naive": ("#e69f00", "v"),
        "flat": ("#f0c93a", "<"),
        "bucketed": ("#cc79a7", "D"),
        "overlapped": ("#d55e00", "P"),
        "sharded_optimizer": ("#882255", "X"),
        "fully_sharded": ("#009e73", "h"),
        "torch_ddp": ("#0072b2", "o"),
        "torch_fsdp": ("#56b4e9", "^"),
    },
    phases=("correctness", *PHASES),
    sizes=SIZES,
    line=("bucket_mib", "compute_dtype"),
    ways=("bucket_mib", "compute_dtype"),
    label=lambda result: run_label(result).replace("-", " · "),
    run_label=run_label,
    setting=setting,
)


def place(case: Case) -> tuple:
    """Which model was trained on what: equal for the methods of a point."""
    sizes = tuple(getattr(case, name) for name in SIZES)
    return (*sizes, case.attention or "", case.steps or 0, case.heads or 0, setting(case))


def without_ranks(case: Case) -> Case:
    """The same for every number of ranks: its place and setting are those of all of them."""
    return case.but(ranks=None)


def model(case: Case) -> str:
    """The model in words: its label, or width × depth."""
    return case.model or f"{case.width}×{case.depth}"


def by_place(found: Sequence[Result]) -> dict[tuple, list[Result]]:
    """The results of each point, small models first."""
    groups = grouped(found, lambda result: place(result.case))
    return {key: groups[key] for key in sorted(groups)}


def efficiency(result: Result, here: Sequence[Result]) -> Interval | None:
    """Scaling efficiency among the results of one point; None without NONE, or of NONE itself."""
    alone = next((r for r in here if r.case.method == NONE), None)
    if alone is None or result.case.method == NONE:
        return None
    return over(alone, result)


def over_peer(result: Result, here: Sequence[Result]) -> Interval | None:
    """Speed over PyTorch's own wrapper, above 1 it is the faster; None without that."""
    peer = next((r for r in here if r.case.method == PEER and r.as_usual), None)
    return None if peer is None or peer is result else over(peer, result)


def epoch_hours(result: Result) -> float | None:
    """Hours for every token of OpenWebText once."""
    rate = result.rates.get("tokens_per_s")
    return OPENWEBTEXT / rate / 3600 if rate else None


def of_phase(results: Results, phase: str) -> list[Result]:
    """The results of a phase, methods in reading order."""
    return sorted(results.of(phase), key=lambda r: (place(r.case), r.line_order, r.label))
