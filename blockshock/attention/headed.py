"""Some heads of a pattern: what a rank needs that holds these heads alone.

mask[b, h, i, j] of heads start … stop  =  mask[b, start + h, i, j] of all
"""

from blockshock.attention.rules import Pattern


def some_heads(pattern: Pattern, start: int, stop: int) -> Pattern:
    """The pattern of heads start to stop; the same object where all heads see alike.

    Raises:
        ValueError: heads that it has not.
    """
    heads = pattern.sizes[1]
    if not 0 <= start < stop or (heads is not None and stop > heads):
        raise ValueError(
            f"heads {start} to {stop} of pattern {pattern.name}, which has "
            f"{'any number' if heads is None else heads}: give 0 <= start < stop within them"
        )
    if not pattern.per_head:
        return pattern
    batch, _, Tq, Tk = pattern.sizes
    return Pattern(
        f"heads {start} to {stop} of {pattern.name}",
        _shifted(pattern.predicate, start),
        None,
        pattern.per_batch,
        True,
        (batch, None if heads is None else stop - start, Tq, Tk),
        (_again, (pattern.recipe, start, stop)) if pattern.recipe else None,
        tuple(_shifted(part, start) for part in pattern.parts),
        pattern.depends_on,
    )


def _shifted(predicate, start: int):
    return lambda batch, head, query, key: predicate(batch, head + start, query, key)


def _again(recipe: tuple, start: int, stop: int) -> Pattern:
    builder, arguments = recipe
    return some_heads(builder(*arguments), start, stop)
