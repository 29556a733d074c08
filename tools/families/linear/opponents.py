"""Which results a Block-Shock line is compared with: those of the same place, of them the better.

A place is a size and a setting. Kernel and reduce are no part of it: they belong to the line, so
that methods which sum in different ways still meet.
"""

from collections.abc import Iterable

from tools.cases import Result
from tools.families.linear.naming import VARIANTS, setting

BETTER, SAME_REDUCE = "the better dense TP", "the better dense TP with the same reduce"
DENSE = ("dense_tp_row", "dense_tp_column")


def opponents(group: list[Result], results: Iterable[Result]) -> list[tuple]:
    """(words, function that finds the dense results) for each opponent of a Block-Shock line."""
    found = [(BETTER, dense_as_usual)]
    if any(dense_as_usual(results, r) != dense_same_reduce(results, r) for r in group):
        found.append((SAME_REDUCE, dense_same_reduce))
    return found


def dense_as_usual(results: Iterable[Result], result: Result) -> list[Result]:
    """The dense tensor-parallel results at the same place as users run them; in training those that
    train as much.
    """
    return [dense for dense in _all_dense(results, result) if not dense.unusual]


def dense_same_reduce(results: Iterable[Result], result: Result) -> list[Result]:
    """The same with the reduce of `result`; a method without it as users run it."""
    found = _all_dense(results, result)
    same = {d.case.method: d for d in found if not d.unusual}
    same |= {d.case.method: d for d in found if d.case.reduce == result.case.reduce}
    return list(same.values())


def _all_dense(results: Iterable[Result], result: Result) -> list[Result]:
    policies = ("frozen",) if result.case.policy == "frozen" else (None, "plain")
    return [
        dense
        for dense in results
        if dense.case.method in DENSE
        and place(dense) == place(result)
        and (dense.case.phase != "training" or dense.case.policy in policies)
    ]


def better(dense: list[Result]) -> Result:
    """The one with the shortest median of all its rounds: the ratio to it is that of two results,
    the same wherever it is shown.
    """
    return min(dense, key=lambda one: one.median)


def place(result: Result) -> tuple:
    """What two results must share to be compared: sizes and setting."""
    return (result.case.N, result.case.B, setting(result.case))


def forward_place(result: Result) -> tuple:
    """The place of the forward of a training result: it has no loss and no optimizer."""
    case = result.case.but(loss=None, optimizer=None)
    return (case.N, case.B, setting(case))


def way(result: Result) -> tuple:
    """How it is computed: method, mask, kernel and reduce."""
    return tuple(getattr(result.case, name) for name in ("method", *VARIANTS))


def same_terms(one: Result, other: Result) -> bool:
    """Whether two superposed layers have the same terms, summed in the same way."""
    return (one.case.mask, one.case.reduce) == (other.case.mask, other.case.reduce)
