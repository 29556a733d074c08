"""What a Block-Shock line is compared with: dense tensor parallelism at the same place.

A place is a size and a setting. Mask, kernel and reduce are no part of it: they belong to the line,
so that methods which sum in different ways still meet. There are two opponents, and each is the
faster of dense_tp_row and dense_tp_column at that place:

    dense TP (NCCL)      as users run it today: summed by the library's collective
    dense TP (same sum)  summed as the Block-Shock line sums; a method that was not measured so, or
                         has no other sum, stands there as it usually is
"""

from collections.abc import Iterable

from tools.cases import Result, Results, grouped
from tools.families.linear.naming import VARIANTS, setting

DENSE = ("dense_tp_row", "dense_tp_column")
SAME_SUM = "dense TP (same sum)"


def usual_name(results: Results) -> str:
    """Dense TP as users run it, with the library that sums: "dense TP (NCCL)"."""
    backend = results.machine.get("backend") or "collective"
    return f"dense TP ({'NCCL' if backend == 'nccl' else backend})"


def dense_by_place(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """The dense tensor-parallel results of each place, however they sum."""
    return grouped((r for r in results if r.case.method in DENSE), place)


def as_usual(dense: Iterable[Result]) -> list[Result]:
    """Those that sum as users do today."""
    return [one for one in dense if not one.unusual]


def same_sum(dense: list[Result], result: Result) -> list[Result]:
    """One of each dense method, with the sum of `result` where it was measured so."""
    same = [one for one in dense if one.case.reduce == result.case.reduce]
    return list({one.case.method: one for one in as_usual(dense) + same}.values())


def place(result: Result) -> tuple:
    """What two results must share to be compared. A step that trains no weight has its own."""
    case = result.case
    return (case.phase, case.N, case.B, setting(case), case.policy == "frozen")


def forward_place(result: Result) -> tuple:
    """The place of the forward of a training result: it has no loss and no optimizer."""
    case = result.case.but(loss=None, optimizer=None)
    return (case.N, case.B, setting(case))


def way(result: Result) -> tuple:
    """How it is computed: method, mask, kernel and reduce."""
    return tuple(getattr(result.case, name) for name in ("method", *VARIANTS))


def same_call(result: Result) -> tuple:
    """What results of the same layer and input share, whatever was asked of it."""
    case = result.case
    return (*way(result), case.N, case.K, case.B, case.dtype, case.bias, case.input)
