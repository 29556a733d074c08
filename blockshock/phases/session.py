"""In the parent: the ranks are asked for the cases of a point, and their answers become results.

A failure ends all ranks, but only the case that was being worked on is lost: the others are
measured again with fresh ranks. Cases that found no room beside their neighbours are measured after
them, together; what runs out of memory there as well, alone. A result says what it stood beside.
"""

import statistics
import warnings
from dataclasses import replace

from blockshock.distributed import RankFailure
from blockshock.measure import clock, environment
from blockshock.phases import engine
from blockshock.phases.case import Case
from blockshock.phases.engine import Options
from blockshock.phases.families import family

SCHEMA = 1


class CaseFailed(Exception):
    """A case has no result; the text says why."""


class Laboratory:
    """Measures cases on a pool of ranks and keeps what it measured for the session.

    deadline: seconds that the cases of one point may take together; a hang ends there.
    """

    def __init__(self, ranks, options: Options, *, deadline: float = 600.0):
        self.ranks, self.options, self.deadline = ranks, options, deadline
        self._done: dict[str, dict | Exception] = {}
        self._no_ceilings: RankFailure | None = None

    def ceilings(self) -> dict:
        """What the machine can do at most; measured on first use and kept with every result.

        Raises the RankFailure of the second of two attempts, and from then on the same one.
        """
        for last in (False, True):
            if self.options.ceilings is None and self._no_ceilings is None:
                try:
                    found = self.ranks.run(engine.measure_ceilings, timeout=self.deadline)[0]
                    self.options = replace(self.options, ceilings=found)
                except RankFailure as failure:
                    self._no_ceilings = failure if last else None
        if self._no_ceilings is not None:
            raise self._no_ceilings
        return self.options.ceilings

    def result(self, case: Case, neighbours: list[Case]) -> tuple[list[float], dict]:
        """(samples in seconds, extra_info) of a case, measured beside its neighbours.

        Raises CaseFailed when it was refused, was wrong, or a rank failed while it was at work.
        """
        self._require_possible(case)
        if case.id not in self._done:
            waiting = [c for c in neighbours if c.id not in self._done and c.id != case.id]
            self._measure([case, *waiting])
        done = self._done[case.id]
        if isinstance(done, Exception):
            raise done
        return done["samples"], done["extra_info"]

    def check(self, case: Case) -> None:
        """Runs a case once and checks what it gives; nothing is timed or kept.

        Raises CaseFailed, as `result` does.
        """
        self._require_possible(case)
        unmeasured = replace(self.options, rounds=0)
        try:
            outcomes = self.ranks.run(
                engine.measure_point, [case], unmeasured, timeout=self.deadline
            )
        except RankFailure as failure:
            raise CaseFailed(str(failure)) from None
        _require_right([outcome for (outcome,) in outcomes])

    def _require_possible(self, case: Case) -> None:
        if case.ranks != self.ranks.size:
            raise CaseFailed(
                f"{case.id} is for {case.ranks} ranks and {self.ranks.size} run; make it with "
                f"ranks={self.ranks.size}"
            )
        try:
            family(case)
        except ValueError as error:
            raise CaseFailed(str(error)) from None

    def _measure(self, cases: list[Case]) -> None:
        try:
            self.ceilings()
        except RankFailure as failure:
            told = f"what this machine can do at most could not be measured: {failure}"
            self._done |= {case.id: CaseFailed(told) for case in cases}
            return
        waiting = list(cases)
        while waiting:
            before = self._clocks()
            try:
                outcomes = self.ranks.run(
                    engine.measure_point, waiting, self.options, timeout=self.deadline
                )
            except RankFailure as failure:
                waiting = self._blame(failure, waiting)
                continue
            clocks = {"before": before, "after": self._clocks()}
            crowded, measured = [], []
            for case, per_rank in zip(waiting, zip(*outcomes, strict=True), strict=True):
                if len(waiting) > 1 and any("crowded" in outcome for outcome in per_rank):
                    crowded.append(case)
                else:
                    done = _merge(case, per_rank, self.ranks.device, clocks)
                    self._done[case.id] = done
                    if not isinstance(done, Exception):
                        measured.append((case, done["samples"], done["extra_info"]))
            learn = family(waiting[0]).learn
            if learn and measured:
                try:
                    learn(measured, self.ranks.run)
                except RankFailure as failure:  # what was measured stays
                    warnings.warn(f"`auto` learned nothing from it: {failure}", stacklevel=1)
            if crowded == waiting:
                for case in crowded:
                    self._measure([case])
                return
            waiting = crowded

    def _blame(self, failure: RankFailure, waiting: list[Case]) -> list[Case]:
        """Notes the failure on the case that was at work; returns the cases still to measure."""
        guilty = next((c for c in waiting if failure.note.endswith(c.id)), None)
        if failure.note.startswith("timing") and len(waiting) > 1:
            # A GPU works behind its host: the note may be ahead of the case that failed.
            for case in waiting:
                self._measure([case])
            return []
        if guilty is None:  # it happened before any case: none of them can be measured
            for case in waiting:
                self._done[case.id] = CaseFailed(str(failure))
            return []
        rest = [c for c in waiting if c is not guilty]
        if failure.exc_type == "OutOfMemoryError" and rest:
            self._measure([guilty])
        else:
            self._done[guilty.id] = CaseFailed(str(failure))
        return rest

    def _clocks(self):
        on_gpus = self.ranks.device == "cuda"
        return environment.clocks(list(range(self.ranks.size))) if on_gpus else None


def _merge(case: Case, per_rank, device: str, clocks: dict) -> dict | Exception:
    """One result from the outcomes of all ranks: the slowest time, the largest error and memory.

    The regions are those of one rank, the slowest, so that they fit together.
    """
    try:
        _require_right(per_rank)
    except CaseFailed as failure:
        return failure
    first = per_rank[0]
    calls = first["timing"]["calls_per_sample"]
    try:
        samples = clock.slowest([outcome["times"] for outcome in per_rank], calls)
    except ValueError as error:
        return CaseFailed(f"{case.id}: {error}")
    info = {
        "schema": SCHEMA,
        "id": case.id,
        **family(case).usuals(case),
        "case": case.as_dict(),
        "device": device,
        **{key: value for key, value in first.items() if key != "times"},
        "errors": _worst([outcome["errors"] for outcome in per_rank]),
        "regions": max(
            (outcome["regions"] for outcome in per_rank), key=lambda found: found["total"]["p50"]
        ),
        "memory": _largest([outcome["memory"] for outcome in per_rank]),
        "rates": family(case).rates(case, statistics.median(samples), first),
        "clocks": clocks if clocks["before"] else None,
    }
    return {"samples": samples, "extra_info": info}


def _require_right(per_rank) -> None:
    for key in ("refused", "failed"):
        reasons = [outcome[key] for outcome in per_rank if key in outcome]
        if reasons:
            raise CaseFailed(reasons[0])


def _worst(errors: list[dict]) -> dict:
    return {
        name: max((rank[name] for rank in errors), key=lambda figure: figure["ratio"])
        for name in errors[0]
    }


def _largest(memory: list[dict]) -> dict:
    """The largest of the ranks for each figure, and what each rank has."""
    largest = {
        key: None if value is None else max(rank[key] for rank in memory)
        for key, value in memory[0].items()
    }
    return {**largest, "ranks": memory}
