"""Benchmark JSON of schema 1, read into plain dataclasses. The schema is described in SCHEMA.md.

Whatever is wrong with a file (missing, truncated, not JSON, no schema, another version, a time
that is not one) is a ToolError of one line that names the file, what was found and the fix.
"""

import json
import math
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.cases import PLAIN, Case, Naming, Region, Result, Results, order
from tools.families import FAMILIES
from tools.files import ToolError, read_text

SCHEMA = 1
COUNT = re.compile(r"\b\d+x ")  # of GPUs, in the name of a device
COMMIT = re.compile(r"[0-9a-f]{7,40}")


def load(path: str | Path) -> Results:
    """Read one benchmark JSON file. Raises ToolError, in one line, for whatever is wrong."""
    text = read_text(path)
    if not text.strip():
        raise ToolError(f"{path} is empty: the run that wrote it did not end; measure again")
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"at character {error.pos} of {len(text)}" if hasattr(error, "pos") else "too deep"
        raise ToolError(
            f"{path} is not JSON, or was cut short ({where}): measure again, or copy it again"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ToolError(
            f"{path} is JSON, but no benchmark file: it has no list 'benchmarks'; "
            "give a file written by pytest bench"
        )
    if not content["benchmarks"]:
        raise ToolError(f"{path} has no benchmarks: every case was skipped, failed or disabled")
    results = [_result(entry, path) for entry in content["benchmarks"]]
    seen: set[str] = set()
    for result in results:
        if result.id in seen:
            raise ToolError(f"{path}: the id {result.id!r} is there twice; ids must be unique")
        seen.add(result.id)
    machine = content.get("machine_info")
    machine = machine.get("blockshock") if isinstance(machine, dict) else None
    if not isinstance(machine, dict) or not machine.get("device") or not machine.get("kind"):
        raise ToolError(
            f"{path} does not say which device was measured (machine_info.blockshock): "
            "measure again with pytest bench"
        )
    date = str(content.get("datetime", ""))
    found = [result.case.family for result in results]
    notes = [
        f"{path} has {found.count(name)} cases of the family {name}, which these tools do not "
        "know: their times are in the report's tables, and compared; they have no figures"
        for name in dict.fromkeys(found)
        if name not in FAMILIES
    ]
    ordered = tuple(sorted(results, key=order))
    return Results((str(path),), machine, (date,), ordered, tuple(notes), _commit(content))


def load_all(paths: Iterable[str | Path]) -> Results:
    """Read several files of one device as one. An id in two of them is taken from the later file,
    and said so in `notes`. Raises ToolError when the devices differ.
    """
    return _merged([load(path) for path in paths])


def load_by_device(paths: Iterable[str | Path]) -> list[Results]:
    """Read several files, those of one device and number of ranks as one, in the order given."""
    groups: dict[tuple, list[Results]] = {}
    for results in (load(path) for path in paths):
        machine = results.machine
        key = (results.device, machine["kind"], machine.get("ranks"))
        groups.setdefault(key, []).append(results)
    return [_merged(group) for group in groups.values()]


def load_by_card(paths: Iterable[str | Path]) -> list[Results]:
    """Read several files, those of one kind of GPU as one, however many of them were used.

    An id is there once for each number of ranks; the device is "NVIDIA H200", or "CPU".
    """
    groups: dict[str, list[Results]] = {}
    for results in (load(path) for path in paths):
        card = "CPU" if results.cpu else COUNT.sub("", results.device)
        machine = results.machine | {"device": card, "ranks": None}
        groups.setdefault(card, []).append(replace(results, machine=machine))
    return [_merged(group, lambda r: (r.id, r.case.ranks)) for group in groups.values()]


def _merged(
    loaded: list[Results], key: Callable[[Result], Hashable] = lambda result: result.id
) -> Results:
    first = loaded[0]
    merged: dict[Hashable, Result] = {}
    notes: list[str] = []
    for results in loaded:
        notes += results.notes
        if (results.device, results.machine["kind"]) != (first.device, first.machine["kind"]):
            raise ToolError(
                f"{first.files[0]} was measured on {first.device}, {results.files[0]} on "
                f"{results.device}: give files of one device"
            )
        if results.caches != first.caches:
            shown = [" and ".join(sorted(one.caches)) or "unknown" for one in (first, results)]
            notes.append(
                f"{first.files[0]} has {shown[0]} caches; {results.files[0]} has {shown[1]}"
            )
        if results.versions != first.versions:
            notes.append(
                f"{first.files[0]} has {first.versions}; {results.files[0]} has {results.versions}"
            )
        again = [result.id for result in results.results if key(result) in merged]
        if again:
            notes.append(
                f"cases in more than one file: {len(again)} ({again[0]}, …); "
                f"those of {results.files[0]} are used"
            )
        merged |= {key(result): result for result in results.results}
    return Results(
        tuple(file for results in loaded for file in results.files),
        first.machine,
        tuple(date for results in loaded for date in results.dates),
        tuple(sorted(merged.values(), key=order)),
        tuple(notes),
        tuple(dict.fromkeys(commit for results in loaded for commit in results.commits)),
    )


def _commit(content: dict) -> tuple[str, ...]:
    """The commit that pytest-benchmark noted; none where it found no repository."""
    info = content.get("commit_info")
    name = info.get("id") if isinstance(info, dict) else None
    if not isinstance(name, str) or not COMMIT.fullmatch(name):  # "unknown", "unversioned"
        return ()
    return (name[:7] + " + changes" * bool(info.get("dirty")),)


def _result(entry: Any, path: str | Path) -> Result:
    name = entry.get("name", "?") if isinstance(entry, dict) else "?"
    where = f"{path}: {name}"
    info = entry.get("extra_info") if isinstance(entry, dict) else None
    if not isinstance(info, dict) or "schema" not in info:
        raise ToolError(f"{where} has no schema: it was not written by pytest bench of Block-Shock")
    if info["schema"] != SCHEMA:
        raise ToolError(
            f"{where} has schema {info['schema']!r}, these tools read {SCHEMA}: "
            "use the tools of the version that measured it, or measure again"
        )
    case = info.get("case")
    if not isinstance(case, dict) or not isinstance(info.get("id"), str):
        raise ToolError(f"{where} has no id or no case: the file was changed; measure again")
    family = FAMILIES.get(case.get("family"))
    naming = family.naming if family else PLAIN
    return Result(
        id=info["id"],
        # Files from before `usual` name the mask alone.
        usual=_section(info, "usual", where) or {"mask": info.get("usual_mask")},
        case=_case(case, naming, where),
        naming=naming,
        samples=_samples(entry, where),
        timing=_section(info, "timing", where),
        regions={
            region: _region(values, where)
            for region, values in _section(info, "regions", where).items()
        },
        errors={
            tensor: _finite_only(values)
            for tensor, values in _section(info, "errors", where).items()
            if isinstance(values, dict)
        },
        drift=_lists(_section(info, "drift", where)),
        curves=_lists(_section(info, "curves", where)),
        memory=_finite_only(_section(info, "memory", where)),
        rates=_finite_only(_section(info, "rates", where)),
        floor=_finite_only(_section(info, "floor", where)),
        paths={str(k): str(v) for k, v in _section(info, "paths", where).items()},
        pattern=_section(info, "pattern", where),
        clocks=_section(info, "clocks", where) or None,
        file=str(path),
    )


def _case(case: dict, naming: Naming, where: str) -> Case:
    names = ("family", "phase", "method")
    for name in names:
        if not isinstance(case.get(name), str):
            raise ToolError(f"{where} has no {name} in its case: measure again")
    for name in (*naming.sizes, "ranks"):
        value = case.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ToolError(f"{where} has {name}={value!r}, which must be a positive integer")
    fields = {
        # A list is kept as its text, so that cases can be keys.
        name: json.dumps(value) if isinstance(value, list | dict) else value
        for name, value in case.items()
        if name not in names
    }
    return Case(*(case[name] for name in names), fields)


def _samples(entry: dict, where: str) -> tuple[float, ...]:
    stats = entry.get("stats")
    data = stats.get("data") if isinstance(stats, dict) else None
    if not isinstance(data, list) or not data:
        raise ToolError(
            f"{where} has no samples (stats.data): write it with --benchmark-json, "
            "or add --benchmark-save-data"
        )
    for value in data:
        if not _is_number(value) or value <= 0:
            raise ToolError(f"{where} has a sample of {value!r} s: a time is finite and positive")
    return tuple(float(value) for value in data)


def _section(info: dict, name: str, where: str) -> dict:
    section = info.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ToolError(f"{where}: {name} is not an object; see tools/SCHEMA.md")
    return section


def _region(values: Any, where: str) -> Region:
    times = {name: isinstance(values, dict) and values.get(name) for name in ("avg", "p50", "p95")}
    for name, value in times.items():
        if not _is_number(value):
            raise ToolError(f"{where}: a region has no {name}; see tools/SCHEMA.md")
    return Region(**times)


def _lists(values: dict) -> dict[str, tuple[float, ...]]:
    return {
        label: tuple(float(value) for value in found)
        for label, found in values.items()
        if isinstance(found, list) and all(_is_number(value) for value in found)
    }


def _finite_only(values: dict) -> dict[str, float]:
    return {name: value for name, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
