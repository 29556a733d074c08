"""What each method is measured with, where it has options of its own.

A list applies to the methods that take the option. Where only some are meant, the axis is a
mapping, `bucket_mib: {overlapped: [5, 25]}`, and the others keep their usual value.
"""

from itertools import product

from blockshock.phases.axes import combine, of
from blockshock.phases.data_parallel.case import OPTIONS, DataParallelCase, taken


def expand(case: type[DataParallelCase], axes: dict, phase: str, ranks: int) -> list:
    """Every combination of the axes, each method with the options that it takes."""

    def chosen(method):
        values = [_of_axis(name, axes[name], method) for name in OPTIONS]
        return [dict(zip(OPTIONS, one, strict=True)) for one in product(*values)]

    return combine(case, axes, phase, ranks, chosen)


def _of_axis(name: str, axis: list | dict, method: str) -> list:
    usual = [of(DataParallelCase)[name].default]
    if name not in taken(method):
        return usual
    return axis.get(method, usual) if isinstance(axis, dict) else axis
