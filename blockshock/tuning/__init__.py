"""What is fastest here: measured where it is asked for, and kept on disk.

A question is a text that names all that the answer depends on: method, direction, sizes, dtype,
ranks, what was asked for. `pick` answers it with one of the candidates: the fastest of all that
can be had, each measured end to end at these very sizes, with every rank of the group (`race`).

Numbers of rows fall into classes (`sizes`). The first one of a class that a process asks for is
looked up, or measured. Another one then takes the nearest answer of the class that is among its
candidates, without asking any rank, and its source tells "of B=…"; what was measured at the very
rows is preferred. `exact_sizes` switches classes off, as the laboratory and `tune` need it.

An answer holds for the GPU, driver and libraries it was measured with: `cache_file` names them.
`BLOCKSHOCK_TUNE=0` switches measuring off: what is on disk still counts, and where nothing is, a
rule decides: the first candidate of the first kind.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from blockshock import cache
from blockshock.distributed.groups import ByGroup
from blockshock.measure import environment, nvidia_smi
from blockshock.tuning import sizes
from blockshock.tuning.answers import Answer, Memory, hold
from blockshock.tuning.race import Race, Step

log = logging.getLogger("blockshock.tuning")

KINDS = 1.3  # how far behind a kind may be with its first candidate, for the others to enter
RIVALS = ((1.15, 7), (1.06, 31))  # those so near to the fastest are timed in so many rounds more
CLEARLY, OFTEN = 0.98, 0.9  # a clearly faster one takes at most this time, in so many rounds

_memory = ByGroup(Memory)
_alone = Memory()  # of `recall`, which ranks need not have alike
_exact = False  # whether each size is measured by itself
_told: set[Path] = set()  # for which files it was said that there is measuring


def exact_sizes(on: bool = True) -> None:
    """Whether each number of rows is measured by itself from now on. To be called by all ranks."""
    global _exact
    if on != _exact:
        _exact = on
        for memory in _memory.all():
            memory.answers.clear()  # some may be of other rows; what was measured stays settled


def known(question: str, group=None) -> Answer | None:
    """The answer in memory."""
    return _memory.of(group).answers.get(question)


def pick(
    question: str,
    candidates: dict[str, dict[str, Step]],
    device: torch.device,
    group=None,
    *,
    trials: Mapping[str, Step] | None = None,
    stand_in: Callable[[], Answer] | None = None,
) -> Answer:
    """The fastest candidate. A collective of the group, at the first call for a class of rows;
    another number of rows of the class is answered by the same times.

    candidates: by kind, and in it by name, functions without arguments that do the work once. A
    kind far behind with its first candidate does not enter the others. Not inside a capture.
    trials: by kind, what a rank does of it without the others: where one rank cannot, all leave
    the kind out. stand_in: gives the answer to a like question, where this one is not measured.
    """
    if found := known(question, group):
        return found
    names = [name for of_kind in candidates.values() for name in of_kind]
    memory = _memory.of(group)
    if found := memory.find(question, names, exact=_exact):
        return remember(question, found, group)
    kept, may_measure = _of_first(_looked_up(question) if _first(group) else None, group)
    for other, answer in kept.items():
        memory.settle(other, answer)
    if found := memory.find(question, names, exact=_exact):
        return remember(question, found, group)
    if stand_in:
        found = stand_in().of(names)
    elif may_measure:
        found = _measured(question, candidates, trials or {}, device, group)
    else:
        found = Answer(names[0], "by rule: BLOCKSHOCK_TUNE=0")
    memory.settle(question, found)
    return remember(question, found, group)


def recall(question: str, names: list[str], shipped: Mapping[str, dict]) -> Answer | None:
    """What was measured for the question, or for other rows of its class, as far as this process
    can know: no rank is asked, and nothing is measured.

    names: the candidates. shipped: entries by question as on disk, which come after the disk's.
    """
    found = _alone.find(question, names, exact=_exact)
    if found is None:
        for entries in (shipped, cache.read(cache_file())):
            for other, answer in _of_class(question, entries).items():
                _alone.settle(other, answer)
        found = _alone.find(question, names, exact=_exact)
    return found


def remember(question: str, answer: Answer, group=None) -> Answer:
    """Keeps an answer in memory."""
    hold(_memory.of(group).answers, question, answer)
    return answer


def clearly_faster(samples: list[float], than: list[float]) -> bool:
    """Whether times are clearly below others that were measured in turn with them."""
    wins = [a < b for a, b in zip(samples, than, strict=True)]
    return median(samples) <= CLEARLY * median(than) and sum(wins) >= OFTEN * len(wins)


def learn(question: str, name: str, ratio: float) -> None:
    """Takes another candidate from now on, which the laboratory found `clearly_faster`.

    ratio: of its time to that of the candidate taken so far. (The laboratory's seconds are not
    comparable with a race's.)
    """
    _memory.drop_destroyed()
    for group, memory in _memory.items():
        answer = memory.settled_for(question)
        if answer is not None and answer.name in answer.seconds:
            times = answer.seconds | {name: ratio * min(answer.seconds.values())}
            learned = Answer(name, "measured", times)
            memory.settle(question, learned)
            hold(memory.answers, question, learned)
            if _first(group):
                _store(question, learned, replace=True)


def forget() -> None:
    """Asks the disk again."""
    _memory.clear()
    _alone.settled.clear()
    cache_file.cache_clear()


def _looked_up(question: str) -> tuple[dict[str, Answer], bool]:
    """(what the disk says of a class of rows, by question; whether measuring is allowed), on the
    rank that speaks for all.
    """
    allowed = os.environ.get("BLOCKSHOCK_TUNE", "1") != "0"
    return _of_class(question, cache.read(cache_file())), allowed


def _of_class(question: str, entries: Mapping[str, dict]) -> dict[str, Answer]:
    """Those of the entries that answer a question of the same class of rows."""
    whole, _ = sizes.split(question)
    same = {asked: entry for asked, entry in entries.items() if sizes.split(asked)[0] == whole}
    answers = {asked: _of_entry(entry) for asked, entry in same.items()}
    return {asked: answer for asked, answer in answers.items() if answer is not None}


def _of_entry(entry) -> Answer | None:
    try:
        times = {str(name): float(value) for name, value in entry["seconds"].items()}
        return Answer(str(entry["way"]), "kept", times)
    except (TypeError, KeyError, ValueError, AttributeError):  # not of this form
        return None


def _measured(question: str, kinds: dict, trials, device: torch.device, group) -> Answer:
    _tell(question, group)
    race = Race(device, group)
    kinds = _that_run(kinds, trials, race)
    race.enter(next(iter(of_kind.items())) for of_kind in kinds.values())
    near = set(race.near(KINDS))
    for of_kind in kinds.values():
        first, *others = of_kind.items()
        if first[0] in near:
            race.enter(others)
    for factor, rounds in RIVALS:
        race.run(race.near(factor), rounds)
    (took,) = race._agreed([race.elapsed])
    best = min(race.seconds, key=race.seconds.get)
    answer = Answer(best, "measured", race.seconds, took)
    log.info("%s: %s, measured in %.1f s", question, best, took)
    if _first(group):
        _store(question, answer)
        kept = _looked_up(question)[0].get(question)
        if kept is None or not any(kept.name in of_kind for of_kind in kinds.values()):
            _store(question, answer, replace=True)  # what stood there could never be used
    return answer


def _that_run(kinds: dict, trials: Mapping[str, Step], race: Race) -> dict:
    """The kinds that every rank can run."""
    problems = {kind: race.cannot(trials[kind]) for kind in kinds if kind in trials}
    able = {kind: of_kind for kind, of_kind in kinds.items() if problems.get(kind) is None}
    if not able:
        raise next(iter(problems.values()))
    for kind in kinds.keys() - able.keys():
        log.warning("%s is left out of the choice: %s", kind, problems[kind])
    return able


def _store(question: str, answer: Answer, *, replace: bool = False) -> None:
    found = {question: entry(answer), "holds for": holds_for()}
    cache.add(cache_file(), found, replace=replace)


def entry(answer: Answer) -> dict:
    """An answer as a file holds it."""
    times = {name: float(f"{seconds:.4g}") for name, seconds in answer.seconds.items()}
    return {"way": answer.name, "seconds": dict(sorted(times.items(), key=lambda t: t[1]))}


def _tell(question: str, group) -> None:
    if cache_file() not in _told and _first(group):
        log.warning(
            "measuring what is fastest here for %s, a second or two at the first use of each class "
            "of sizes; "
            "kept in %s; BLOCKSHOCK_TUNE=0 switches it off",
            question,
            cache_file(),
        )
    _told.add(cache_file())


def holds_for() -> dict[str, str | None]:
    """What an answer depends on besides its question."""
    names = ("version", "torch", "cuda", "nccl", "cusparselt", "triton")
    versions = environment.versions()
    rows, _ = nvidia_smi.visible_gpus("driver_version")
    driver = rows[0]["driver_version"] if rows else None
    links, _ = nvidia_smi.links()  # nodes that share a home may differ in them alone
    kinds = ", ".join(sorted({link for row in links for link in row} - {"X"}))
    here = {"device": cache.device_name(), "driver": driver, "links": kinds}
    return here | {name: versions[name] for name in names}


@lru_cache(maxsize=1)
def cache_file() -> Path:
    """The file of this device, driver and libraries."""
    text = repr(sorted(holds_for().items()))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return cache.folder() / f"ways-{cache.device_name()}-{digest}.json"


def _first(group) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _of_first(value, group):
    """The value of the group's first rank, on all of them."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, group=group, group_src=0)
    return shared[0]
