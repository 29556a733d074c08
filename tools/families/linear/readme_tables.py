"""The two tables of the README: forward times and training steps, with their ratios to dense TP.

A row is a size. A column is a method as it is usually run; kernels, reduces and masks beside that
have a column only where the comparison is about them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from tools.cases import Result, Results, over
from tools.families.linear.naming import METHODS, NAMING, setting_text
from tools.families.linear.opponents import DENSE
from tools.stats import Interval
from tools.tables import Column, as_markdown, milliseconds, number

REFERENCE, SHOCK = DENSE[0], "block_shock"
OTHER_KERNEL = "cusparselt"
POLICIES = ("packed_master", "float32_master", "dense_master")

Pick = Callable[[list[Result]], Result | None]


def forward_table(results: Results) -> tuple[str, str]:
    """(setting in words, Markdown) of the setting with the most forward results; empty without."""
    text, found = _largest_setting(results.only("linear").of("forward"))
    methods = sorted({r.case.method for r in found}, key=NAMING.place)
    masks = _masks(found)
    main = {mask: f"{SHOCK} ({mask})" if len(masks) > 1 else SHOCK for mask in masks}
    picks: list[tuple[str, Pick]] = [
        ("dense_single", _usual("dense_single")),
        (REFERENCE, _usual(REFERENCE)),
        (f"{REFERENCE}, best other reduce", _best_other_reduce),
        *((title, _usual(SHOCK, mask)) for mask, title in main.items()),
        (f"{SHOCK} · {OTHER_KERNEL}", _other_kernel),
        ("masked_split", _usual("masked_split")),
        ("block_shock_folded", _usual("block_shock_folded")),
        *((method, _usual(method)) for method in methods if method not in METHODS),
    ]
    compared = [*main.values(), *(m for m in methods if m not in METHODS)]
    pick_of = dict(picks)
    ratios = [(f"{title} / {REFERENCE}", pick_of[title], _usual(REFERENCE)) for title in compared]
    ratios += [
        (f"{title} / {REFERENCE}, same reduce", pick_of[title], _same_reduce(pick_of[title]))
        for title in main.values()
    ]
    return text, _table(found, ("N", "B"), picks, ratios)


def training_table(results: Results) -> tuple[str, str]:
    """(setting in words, Markdown) of training steps, all optimizers; empty without."""
    trained = [r for r in results.only("linear").of("training") if r.case.policy != "frozen"]
    text, found = _largest_setting(trained)
    plain, masks = _usual(REFERENCE), _masks(found)
    shocks = {
        policy + (f" ({mask})" if len(masks) > 1 else ""): _usual(SHOCK, mask, policy)
        for policy in POLICIES
        for mask in masks
    }
    picks = [(REFERENCE, plain), *((f"{SHOCK} · {title}", pick) for title, pick in shocks.items())]
    ratios = [(f"{title} / {REFERENCE}", pick, plain) for title, pick in shocks.items()]
    ratios += [
        (f"{title} / {REFERENCE}, same reduce", pick, _same_reduce(pick))
        for title, pick in shocks.items()
        if title.startswith(POLICIES[0])
    ]
    return text, _table(found, ("N", "B", "optimizer"), picks, ratios)


def _largest_setting(found: Iterable[Result]) -> tuple[str, list[Result]]:
    """The setting, whatever the optimizer, with the most results."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in found:
        groups[setting_text(result.case.but(optimizer=None))].append(result)
    return max(groups.items(), key=lambda item: len(item[1]), default=("", []))


def _masks(found: list[Result]) -> list[str | None]:
    """The masks of Block-Shock as it is usually run, its usual mask first."""
    shocks = [r for r in found if r.case.method == SHOCK and r.as_usual]
    return list(dict.fromkeys(r.case.mask for r in sorted(shocks, key=_unusual)))


def _unusual(result: Result) -> tuple:
    return (len(result.unusual), result.label)


def _usual(method: str, mask: str | None = None, policy: str | None = None) -> Pick:
    """Picks the method as it is usually run; with its usual mask where none is named."""

    def pick(here: list[Result]) -> Result | None:
        fits = [
            r
            for r in here
            if r.case.method == method
            and r.as_usual
            and mask in (None, r.case.mask)
            and (r.case.policy == policy or (policy is None and r.case.policy == "plain"))
        ]
        return min(fits, key=_unusual, default=None)

    return pick


def _best_other_reduce(here: list[Result]) -> Result | None:
    others = [r for r in here if r.case.method == REFERENCE and "reduce" in r.unusual]
    return min(others, key=lambda r: r.median, default=None)


def _other_kernel(here: list[Result]) -> Result | None:
    wanted = {"kernel": OTHER_KERNEL}
    found = (r for r in here if r.case.method == SHOCK and r.unusual == wanted)
    return next(found, None)


def _same_reduce(pick: Pick) -> Pick:
    """Picks the reference with the reduce of what `pick` picks, where that is not its usual one."""

    def same(here: list[Result]) -> Result | None:
        shock = pick(here)
        fits = (
            r
            for r in here
            if shock is not None
            and r.case.method == REFERENCE
            and r.case.policy in (None, "plain")
            and r.unusual == {"reduce": shock.case.reduce}
        )
        return next(fits, None)

    return same


def _table(
    found: list[Result],
    sizes: tuple[str, ...],
    picks: list[tuple[str, Pick]],
    ratios: list[tuple[str, Pick, Pick]],
) -> str:
    """Markdown with a row for each combination of `sizes`; a column without a value is left out."""
    rows = []
    places = {tuple(getattr(r.case, size) for size in sizes) for r in found}
    for place in sorted(places, key=lambda values: [(v is None, v) for v in values]):
        here = [r for r in found if tuple(getattr(r.case, size) for size in sizes) == place]
        row: dict = dict(zip(sizes, place, strict=True))
        row |= {title: pick(here) for title, pick in picks}
        for title, one, other in ratios:
            pair = (one(here), other(here))
            row[title] = over(*pair) if None not in pair else None
        rows.append(row)
    columns = [number(size, size) if size != "optimizer" else Column(size, size) for size in sizes]
    columns += [number(title, title, _time) for title, _ in picks]
    columns += [number(title, title, _interval) for title, *_ in ratios]
    filled = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    return as_markdown(filled, rows) if rows else ""


def _time(result: Result) -> str:
    reduce = result.unusual.get("reduce")
    return milliseconds(result.median) + (f" ({reduce})" if reduce else "")


def _interval(interval: Interval) -> str:
    return str(interval) if interval.enough else f"{interval.value:.3f}"
