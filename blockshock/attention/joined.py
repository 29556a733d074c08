"""Patterns made of two: a query attends where both let it, or where one of them does.

Rows that are intervals in both stay intervals under `both`.
"""

import weakref

import torch

from blockshock.attention.rules import SIZES, Pattern


@torch.compiler.disable(reason="patterns are made once; join them outside the compiled function")
def both(a: Pattern, b: Pattern) -> Pattern:
    """A query attends where a and b both let it; ValueError if they fit different shapes."""
    return _joined("both", a, b)


@torch.compiler.disable(reason="patterns are made once; join them outside the compiled function")
def either(a: Pattern, b: Pattern) -> Pattern:
    """A query attends where a or b lets it: BigBird is either(global_band, random_blocks)."""
    return _joined("either", a, b)


# Kept as long as a and b are. What is made of them refers to their functions only, so it does not
# keep them alive.
_JOINED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _joined(how: str, a: Pattern, b: Pattern) -> Pattern:
    for pattern in (a, b):
        if not isinstance(pattern, Pattern):
            raise ValueError(f"{how}({pattern!r}): patterns are joined; make one with a builder")
    kept = _JOINED.setdefault(a, weakref.WeakKeyDictionary()).setdefault(b, {})
    if how not in kept:
        kept[how] = _join(how, a, b)
    return kept[how]


def _join(how: str, a: Pattern, b: Pattern) -> Pattern:
    first, second, first_rows, second_rows = a.predicate, b.predicate, a.interval, b.interval
    interval = None

    def conjunction(batch, head, query, key):
        at = batch, head, query, key
        return first(*at) & second(*at)

    def disjunction(batch, head, query, key):
        at = batch, head, query, key
        return first(*at) | second(*at)

    def intersection(query, Tk):
        (low, high), (other_low, other_high) = first_rows(query, Tk), second_rows(query, Tk)
        return torch.maximum(low, other_low), torch.minimum(high, other_high)

    if how == "both" and first_rows and second_rows:
        interval = intersection
    name = f"{how}({a.name}, {b.name})"
    for what, left, right in zip(SIZES, a.sizes, b.sizes, strict=True):
        if None not in (left, right) and left != right:
            raise ValueError(
                f"{name}: one fits {what} {left}, the other {what} {right}; join patterns of "
                "one size"
            )
    return Pattern(
        name,
        conjunction if how == "both" else disjunction,
        interval,
        a.per_batch or b.per_batch,
        a.per_head or b.per_head,
        tuple(x if y is None else y for x, y in zip(a.sizes, b.sizes, strict=True)),
        (_rejoin, (how, a.recipe, b.recipe)) if a.recipe and b.recipe else None,
        (*(a.parts or (first,)), *(b.parts or (second,))),
        (*a.depends_on, *b.depends_on),
    )


def _rejoin(how: str, *recipes: tuple) -> Pattern:
    """Of recipes, not of patterns: a joined one must not keep its parts alive."""
    return _joined(how, *(builder(*arguments) for builder, arguments in recipes))
