"""Inside a rank: the cases of one point are built, checked, and measured side by side.

    build     what is measured, such as a layer from the point's weight; memory counts from here
    check     its results against the truth; a case that fails is not timed
    prepare   warm-up, and in graph mode the capture
    rounds    all cases of the point in turn, round by round
    regions   an instrumented pass of its own

What a family does in these is in `families`. What the ranks must agree on is agreed by a
collective, so that they always run the same steps. A refusal (ValueError) or a lack of memory while
building is an outcome of that case alone; so is less room than a case before it took ("crowded":
the parent asks again, without those that had room). Any other exception ends the ranks: the parent
then measures the remaining cases with fresh ones.
"""

import contextlib
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from blockshock.distributed import collectives, note
from blockshock.distributed.ranks import device as rank_device
from blockshock.measure import ceilings, clock, errors
from blockshock.measure.regions import Recorder, recording
from blockshock.phases import memory, profiling
from blockshock.phases.case import DTYPES, Case
from blockshock.phases.experiment import Experiment
from blockshock.phases.families import family

REGION_PASSES = 20
MIN_ROUNDS = 10


@dataclass(frozen=True)
class Options:
    """How to measure. mode, l2: see `measure.clock`; mode None is the family's usual one.

    rounds: at most so many samples; 0: cases are checked and not timed. seconds: about how long the
    rounds of one case may take, which lowers the rounds of slow steps, but not below 10
    (`MIN_ROUNDS`), which the tools need for an interval. pause: seconds the host idles before each
    timing, to prove that host time does not count. profile: a folder for traces, or None.
    ceilings: of the machine, from `measure_ceilings`.
    """

    mode: str | None = None
    l2: str = "warm"
    rounds: int = 30
    seconds: float = 2.0
    pause: float = 0.0
    profile: str | None = None
    ceilings: dict | None = None


@dataclass
class Prepared:
    """A case that passed its check and can be timed."""

    case: Case
    built: object
    experiment: Experiment
    outcome: dict
    run: object = None
    calls: int = 1
    took: int = 0  # bytes: the most it needed to be built and checked


def measure_ceilings() -> dict:
    """The machine's ceilings; called in every rank."""
    note("measuring what this machine can do at most")
    return ceilings.measure(DTYPES, rank_device())


def measure_point(cases: list[Case], options: Options) -> list[dict]:
    """One outcome per case: `samples` and figures, or `refused` / `failed` with a reason."""
    device = rank_device()
    phase, of_phases = cases[0].phase, family(cases[0]).timings
    timings = of_phases.get(phase, clock.ON_GPUS) if device.type == "cuda" else ("host",)
    mode = options.mode or timings[0]
    if mode not in timings:
        name = f"{cases[0].family}'s {phase}"
        reason = f"timing mode {mode!r}: {name} is timed in {', '.join(timings)}"
        return [{"refused": f"{reason}; use --timing {timings[0]}"} for _ in cases]
    stopwatch = clock.Stopwatch(mode, device, _aligner(device), l2=options.l2)
    note(f"making the data of {cases[0].point_label}")
    try:
        problem = family(cases[0]).problem(cases[0], device)
    except (ValueError, ImportError) as error:  # a file or an option, alike on every rank
        return [{"refused": str(error)} for _ in cases]
    problem.warm_up()
    outcomes, ready, need = [], [], 0
    for case in cases:
        note(f"building {case.id}")
        if clock.agree_largest(float(memory.room(device) < need), device):
            outcomes.append({"refused": "no room beside its neighbours", "crowded": True})
            continue
        prepared = _prepare(case, problem, stopwatch, options)
        outcomes.append(prepared.outcome)
        if prepared.run is not None:
            ready.append(prepared)
            need = max(need, prepared.took)
    _measure(ready, stopwatch, options)
    for prepared in ready:
        note(f"instrumenting {prepared.case.id}")
        prepared.outcome["regions"] = _regions(prepared, stopwatch)
        if options.profile:
            note(f"profiling {prepared.case.id}")
            prepared.outcome["profile"] = profiling.profile(
                prepared.experiment.step, prepared.case, options.profile
            )
    del problem, ready
    memory.release(device)
    return outcomes


def _prepare(case: Case, problem, stopwatch, options: Options) -> Prepared:
    """Builds, checks and warms up one case; `run` stays None when it was refused or failed.

    What the case before it used was released (by `memory.room`).
    """
    device, prepared = problem.device, Prepared(case, None, None, {})
    held = memory.reserved(device)
    before = memory.allocated(device) - memory.held(problem)  # truths come into being on first use
    built, refusal, build_peak = _build(case, problem)
    if isinstance(refusal, torch.OutOfMemoryError):
        prepared.outcome["crowded"] = True  # it may fit alone
        refusal = f"out of memory while building: {str(refusal).partition('. GPU')[0]}"
    # Ranks refuse together or not at all, except for memory: one rank's lack of it is everyone's.
    if clock.agree_largest(float(refusal is not None), device):
        prepared.outcome["refused"] = str(refusal or "another rank could not build it")
        return prepared
    experiment = family(case).phases[case.phase](case, built, problem)
    note(f"checking {case.id}")
    figures = experiment.check()
    same = all(collectives.same_on_all_ranks(t) for t in experiment.replicated.values())
    experiment.replicated.clear()
    outcome = prepared.outcome
    outcome["errors"] = {name: figure.as_dict() for name, figure in figures.items()}
    wrong = not same or not all(figure.passes for figure in figures.values())
    if clock.agree_largest(float(wrong), device):
        outcome["failed"] = _wrong(case, figures, same)
        return prepared
    if not options.rounds:
        return prepared
    note(f"warming up {case.id}")
    outcome.update(experiment.extra)
    _, peak = memory.peak(experiment.step, device, before + memory.held(problem))
    outcome.update(family(case).figures(case, built, problem, experiment, options.ceilings))
    peaks = {"peak_bytes": peak, "build_peak_bytes": build_peak}
    outcome["memory"] = {**peaks, **outcome["memory"]}
    outcome["truth"] = str(problem.truth_dtype).removeprefix("torch.")
    prepared.built, prepared.experiment = built, experiment
    prepared.took = memory.reserved(device) - held  # a capture gives back what is not used
    prepared.run, prepared.calls = stopwatch.prepare(experiment.step)
    return prepared


def _build(case: Case, problem):
    """(what was built, None, peak bytes over what was there), or (None, the error, None)."""
    device = problem.device

    def build():
        return family(case).build(case, problem)

    try:
        built, peak = memory.peak(build, device, memory.allocated(device))
    except (ValueError, torch.OutOfMemoryError) as error:
        return None, error, None
    return built, None, peak


def _measure(ready: list[Prepared], stopwatch, options: Options) -> None:
    if not ready:
        return
    estimates = []
    for prepared in ready:
        reading = stopwatch.start(prepared.run)
        stopwatch.idle()
        estimates.append(reading())
    slowest = clock.agree_largest(max(estimates), stopwatch.device)
    enough = max(MIN_ROUNDS, int(options.seconds / slowest))
    rounds = min(options.rounds, enough)
    pause = (lambda: time.sleep(options.pause)) if options.pause else None
    samples = clock.measure(
        stopwatch,
        [prepared.run for prepared in ready],
        rounds,
        between=pause,
        notes=[lambda p=prepared: note(f"timing {p.case.id}") for prepared in ready],
    )
    for prepared, times in zip(ready, samples, strict=True):
        changed = family(prepared.case).changed(prepared.built)
        finite = all(torch.isfinite(p).all() for p in changed)
        if clock.agree_largest(float(not finite), stopwatch.device):
            prepared.outcome["failed"] = (
                f"{prepared.case.id}: the weights are no more finite after the timed steps, so "
                "its times are no times of training; choose another input or optimizer"
            )
        prepared.outcome["times"] = times
        prepared.outcome["timing"] = {
            "mode": stopwatch.mode,
            "calls_per_sample": prepared.calls,
            "l2": stopwatch.l2,
            "interleaved_with": [p.case.label for p in ready if p is not prepared],
        }


def _regions(prepared: Prepared, stopwatch) -> dict:
    """Per region: average, median and 95th percentile of its seconds a step; calls and bytes."""
    captured = stopwatch.mode == "graph"
    recorder = Recorder(stopwatch.device.type, captured)
    run = prepared.experiment.step
    if captured:
        # The first call of `capture` warms up and is not recorded.
        run = clock.capture(run, around=lambda: recording(recorder)).replay
    total = []
    for _ in range(REGION_PASSES):
        stopwatch.align()
        with contextlib.nullcontext() if captured else recording(recorder):
            reading = stopwatch.start(run)
        recorder.collect()
        total.append(reading())
    regions = {
        name: {
            **_spread(times),
            "calls": recorder.counts[name][0],
            "bytes": recorder.counts[name][1],
        }
        for name, times in recorder.samples.items()
    }
    return {**regions, "total": {**_spread(total), "calls": 1, "bytes": 0}}


def _spread(seconds: list[float]) -> dict[str, float]:
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    return {"avg": statistics.fmean(seconds), "p50": statistics.median(seconds), "p95": p95}


def _wrong(case: Case, figures: dict, same: bool) -> str:
    try:
        errors.require(figures, case.id)
    except errors.CorrectnessError as error:
        return str(error)
    if not same:
        return f"{case.id} is wrong, so it is not timed: the ranks' results are not the same bits"
    return f"{case.id} is wrong on another rank, so it is not timed"


def _aligner(device: torch.device):
    """A tiny all-reduce: no rank passes it before the last one arrives."""
    token = torch.zeros(1, device=device)
    # Not `collectives.all_reduce`: the meeting is no region of the step.
    return lambda: dist.all_reduce(token)
