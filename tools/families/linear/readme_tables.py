"""What linear layers show in Markdown: the README's one table, and all of results/README.md.

A row is a size. In the README dense TP is the faster of dense_tp_row and dense_tp_column, as in the
verdict. In the full tables a column is a method as it is usually run; kernels, reduces and masks
beside that have a column only where the comparison is about them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from tools.cases import Result, Results, fastest, grouped, over
from tools.drawing.style import spread
from tools.families.linear.choices import choices_table
from tools.families.linear.naming import METHODS, NAMING, setting
from tools.families.linear.opponents import DENSE, as_usual, usual_name
from tools.family import README_ROWS, Written
from tools.tables import Column, as_markdown, filled, interval, milliseconds, number

REFERENCE, SHOCK = DENSE[0], "block_shock"
OTHER_KERNEL = "cusparselt"
POLICIES = ("packed_master", "float32_master", "dense_master")
README_MASKS = ("1100", "tile")
BEST_SUM = "dense TP best sum"

Pick = Callable[[list[Result]], Result | None]
Ratio = tuple[str, Pick, Pick]


def readme(results: Results) -> Written | None:
    """The README's table of the forward, at chosen sizes; None without one."""
    text, found = _largest_setting(results.of("forward"))
    usual = usual_name(results)
    shocks = {mask: _usual(SHOCK, mask) for mask in README_MASKS}
    picks = [
        (f"{usual} ms", _dense),
        (f"{BEST_SUM} ms", _dense_best_sum),
        *((f"{SHOCK} {mask} ms", pick) for mask, pick in shocks.items()),
    ]
    ratios = [(f"{mask} / {usual}", pick, _dense) for mask, pick in shocks.items()]
    places = _chosen_sizes(
        place
        for place, here in _by_size(found, ("N", "B"))
        if _dense(here) and any(pick(here) for pick in shocks.values())
    )
    shown = [r for r in found if (r.case.N, r.case.B) in places]
    if not shown:
        return None
    words = (
        f"Forward of a layer of N outputs on B rows: median ms of {results.clock}; of the ranks, "
        f"the slowest counts. {usual}: the faster of a split by rows and one by columns; "
        f"{BEST_SUM}: that, summed in the fastest way that was measured. Ratios of time with their "
        "95% intervals: below 1 Block-Shock is faster. Rows: the two B that were measured at most "
        "N, and N spread from the smallest to the largest."
    )
    return Written(words, text, _table(shown, ("N", "B"), picks, ratios))


def full(results: Results) -> list[Written]:
    """Times and ratios of the forward and of training, in the setting with the most results; and
    what "auto" chose.
    """
    made = []
    for what, each, table in (
        ("Forward", "", _forward_columns),
        ("Training", " of one step", _training_columns),
    ):
        text, found, sizes, picks, ratios = table(results)
        if not found:
            continue
        words = f"{what}: median ms of {results.clock}{each}."
        made.append(Written(words, text, _table(found, sizes, picks, [])))
        for title, some in (
            (f"over {REFERENCE}", [r for r in ratios if not r[0].endswith("same sum")]),
            ("over the same with the same sum", [r for r in ratios if r[0].endswith("same sum")]),
        ):
            compared = _table(found, sizes, [], some)
            words = f"{what}: time {title}, with 95% intervals; below 1 the first is faster."
            made += [Written(words, text, compared)] * bool(compared)
    choices = choices_table(results)
    made += [Written(choices.note, "", as_markdown(choices.columns, choices.rows))] * bool(
        choices.rows
    )
    return made


def _forward_columns(results: Results) -> tuple:
    """(setting, results, sizes, times, ratios) of the forward."""
    text, found = _largest_setting(results.of("forward"))
    methods = sorted({r.case.method for r in found}, key=NAMING.place)
    masks = _masks(found)
    main = {mask: f"{SHOCK} ({mask})" if len(masks) > 1 else SHOCK for mask in masks}
    picks: list[tuple[str, Pick]] = [
        ("dense_single", _usual("dense_single")),
        (REFERENCE, _usual(REFERENCE)),
        (f"{REFERENCE}, best other sum", _best_other_sum),
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
        (f"{title} / {REFERENCE}, same sum", pick_of[title], _same_sum(pick_of[title]))
        for title in main.values()
    ]
    return text, found, ("N", "B"), picks, ratios


def _training_columns(results: Results) -> tuple:
    """The same of training steps, all optimizers."""
    trained = [r for r in results.of("training") if r.case.policy != "frozen"]
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
        (f"{title} / {REFERENCE}, same sum", pick, _same_sum(pick))
        for title, pick in shocks.items()
        if title.startswith(POLICIES[0])
    ]
    return text, found, ("N", "B", "optimizer"), picks, ratios


def _chosen_sizes(places: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """At most README_ROWS of the sizes: the two B measured at most N (of equals the largest, then
    the smallest), and N spread from the smallest to the largest.
    """
    places = list(places)
    counts = Counter(b for _, b in places)
    first = max(counts, key=lambda b: (counts[b], b), default=None)
    second = max(counts.keys() - {first}, key=lambda b: (counts[b], -b), default=None)
    kept = [place for place in places if place[1] in (first, second)]
    shown = sizes = sorted({n for n, _ in kept})
    while sum(n in shown for n, _ in kept) > README_ROWS:
        shown = spread(sizes, len(shown) - 1)
    return {place for place in kept if place[0] in shown}


def _largest_setting(found: Iterable[Result]) -> tuple[str, list[Result]]:
    """The setting, whatever the optimizer, with the most results."""
    groups = grouped(found, lambda result: setting(result.case.but(optimizer=None)))
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


def _dense(here: list[Result]) -> Result | None:
    return fastest(as_usual(r for r in here if r.case.method in DENSE))


def _dense_best_sum(here: list[Result]) -> Result | None:
    return fastest(r for r in here if r.case.method in DENSE)


def _best_other_sum(here: list[Result]) -> Result | None:
    return fastest(r for r in here if r.case.method == REFERENCE and "reduce" in r.unusual)


def _other_kernel(here: list[Result]) -> Result | None:
    wanted = {"kernel": OTHER_KERNEL}
    found = (r for r in here if r.case.method == SHOCK and r.unusual == wanted)
    return next(found, None)


def _same_sum(pick: Pick) -> Pick:
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


def _by_size(found: list[Result], sizes: tuple[str, ...]) -> Iterator[tuple[tuple, list[Result]]]:
    """The results at each combination of `sizes`, in order."""
    places = grouped(found, lambda r: tuple(getattr(r.case, size) for size in sizes))
    yield from sorted(places.items(), key=lambda item: [(v is None, v) for v in item[0]])


def _table(
    found: list[Result],
    sizes: tuple[str, ...],
    picks: list[tuple[str, Pick]],
    ratios: list[Ratio],
) -> str:
    """Markdown with a row for each combination of `sizes`; a column without a value is left out,
    and the whole table where none has one.
    """
    rows = []
    for place, here in _by_size(found, sizes):
        row: dict = dict(zip(sizes, place, strict=True))
        row |= {title: pick(here) for title, pick in picks}
        for title, one, other in ratios:
            pair = (one(here), other(here))
            row[title] = over(*pair) if None not in pair else None
        rows.append(row)
    where = [number(size, size) if size != "optimizer" else Column(size, size) for size in sizes]
    columns = [number(title, title, _time) for title, _ in picks]
    columns += [number(title, title, interval) for title, *_ in ratios]
    columns = filled(columns, rows)
    return as_markdown([*where, *columns], rows) if columns else ""


def _time(result: Result) -> str:
    reduce = result.unusual.get("reduce")
    dense = result.case.method in DENSE
    return milliseconds(result.median) + (f" ({reduce})" if reduce and dense else "")
