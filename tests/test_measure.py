"""Clock, regions, error figures and floor: the instruments, on inputs whose answer is known."""

import gc
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from blockshock.measure import clock, errors, floor
from blockshock.measure.regions import Recorder, recording, region

CEILINGS = {"matrix_flops": {"bf16": 1e12}, "copy_bytes_per_s": 1e9, "link_bytes_per_s": 1e8}


class FakeBenchmark:
    """What ReplayClock needs of pytest-benchmark, with a timer of one's choice."""

    class _Stats:
        def __init__(self):
            self.data = []

    def __init__(self, timer):
        self.timer = timer
        self.stats = None

    def pedantic(self, target, *, setup, rounds, iterations):
        self.stats = self._Stats()
        self.stats.stats = self.stats
        for _ in range(rounds):
            setup()
            start = self.timer()
            target()
            self.stats.data.append(self.timer() - start)


def test_replay_records_each_sample_to_the_last_digit():
    samples = [1e-7 * (1 + i / 3) for i in range(100)] + [math.pi, 5e-324]
    replay = clock.ReplayClock()
    benchmark = FakeBenchmark(replay)
    replay.replay(benchmark, samples)
    assert benchmark.stats.data == samples


def test_replay_refuses_a_benchmark_with_another_timer():
    with pytest.raises(RuntimeError, match="did not record what the ranks measured"):
        clock.ReplayClock().replay(FakeBenchmark(time.perf_counter), [0.5, 0.25])


def test_rounds_take_turns_and_host_time_between_them_does_not_count():
    order = []
    watch = clock.Stopwatch("host", torch.device("cpu"), lambda: None)
    steps = [lambda name=name: order.append(name) for name in "abc"]
    times = clock.measure(watch, steps, 3, between=lambda: time.sleep(0.005))
    assert "".join(order) == "abcbcacab"
    assert [len(row) for row in times] == [3, 3, 3]
    assert all(seconds < 0.004 for row in times for seconds in row)


def test_short_steps_are_repeated_until_they_can_be_timed():
    watch = clock.Stopwatch("host", torch.device("cpu"), lambda: None)
    calls = []
    run, count = watch.prepare(lambda: calls.append(1))
    assert count == clock.MAX_CALLS
    calls.clear()
    run()
    assert len(calls) == count
    assert watch.prepare(lambda: time.sleep(0.002))[1] == 1


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with an L2 of 1000 bytes, as far as a stopwatch in mode sync needs one."""
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return torch.device("cuda")


def test_a_cold_sample_is_one_call_after_the_l2_was_overwritten(gpu, monkeypatch):
    order = []
    monkeypatch.setattr(clock, "flusher", lambda device: lambda: order.append("flush"))
    for l2, expected in (("cold", ["flush", "meet", "step"]), ("warm", ["meet", *["step"] * 20])):
        watch = clock.Stopwatch("sync", gpu, lambda: order.append("meet"), l2=l2)
        run, calls = watch.prepare(lambda: order.append("step"))
        for _ in range(2):
            order.clear()
            watch.start(run)
            assert order == expected
        assert calls == expected.count("step")


def test_what_is_overwritten_is_larger_than_the_l2(gpu):
    zero = clock.flusher(torch.device("cpu"))
    buffer = zero.__self__
    assert buffer.nbytes > 1000
    buffer.fill_(1)
    zero()
    assert not buffer.any()


def test_a_cold_l2_is_refused_where_there_is_none_or_none_is_told(gpu, monkeypatch):
    for device, l2, told in (("cpu", "cold", "only a GPU"), ("cpu", "tepid", "use one of warm")):
        with pytest.raises(ValueError, match=told):
            clock.Stopwatch("host", torch.device(device), None, l2=l2)
    torch.cuda.get_device_properties(gpu).L2_cache_size = 0
    with pytest.raises(ValueError, match="does not say how large"):
        clock.Stopwatch("sync", gpu, None, l2="cold")


def test_regions_add_up_their_occurrences_and_their_bytes():
    recorder = Recorder("cpu")
    for _ in range(4):
        with recording(recorder), region("step"):
            for _ in range(2):
                with region("part", bytes=10):
                    time.sleep(0.001)
        recorder.collect()
    assert recorder.counts == {"part": (2, 20), "step": (1, 0)}
    assert len(recorder.samples["part"]) == 4
    for part, step in zip(recorder.samples["part"], recorder.samples["step"], strict=True):
        assert 0.002 <= part <= step


def test_regions_cost_nothing_without_a_recorder_and_recorders_do_not_nest():
    with region("idle"):
        pass
    with (
        recording(Recorder("cpu")),
        pytest.raises(RuntimeError, match="nest"),
        recording(Recorder("cpu")),
    ):
        pass
    with recording(Recorder("cpu")):
        pass  # the failure left no recorder behind


def test_an_error_figure_is_the_frobenius_ratio_and_its_companions():
    truth = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    actual = truth + torch.tensor([[0.3, -0.4]])
    found = errors.figure(actual, truth, 0.05, ranks=2)
    assert found.relative == pytest.approx(0.1)
    assert (found.max, found.mean) == (pytest.approx(0.4), pytest.approx(0.35))
    assert found.ratio == pytest.approx(2)
    size = 5 / math.sqrt(2)
    assert found.max_relative == pytest.approx(max(0.3 / size, 0.4 / 4))


@pytest.mark.parametrize(
    ("actual", "dense"),
    [(float("nan"), 0.1), (1.2, 0.1), (1.0, float("nan")), (1.6, 0.55), (1.01, 0.0)],
)
def test_no_wrong_or_unjudgeable_result_passes(actual, dense):
    truth = torch.ones(300, 300, dtype=torch.float64)
    assert not errors.figure(truth * actual, truth, dense, ranks=2).passes


def test_a_scale_is_held_to_a_third_of_the_error_that_passes():
    truth = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).double()
    longer = truth * 1.01
    assert errors.figure(longer, truth, 0.0098, ranks=2).passes
    found = errors.figure(longer, truth, 0.0098, 1e-4, ranks=2)
    assert found.scale == pytest.approx(0.01)
    assert found.scale_limit == pytest.approx(1.5 * 0.0098 / 3)
    with pytest.raises(
        errors.CorrectnessError, match=r"length along the truth is 1\.01 times.*1 ± 0\.0049"
    ):
        errors.require({"gradient": found}, "flat")
    # A yardstick that is itself too long says what the dtype does.
    assert errors.figure(longer, truth, 0.0098, -0.0099, ranks=2).passes
    assert not errors.figure(truth * torch.nan, truth, 0.0098, 1e-4, ranks=2).passes


def test_each_tensor_of_a_vector_is_held_to_its_own_yardstick():
    drawn = torch.Generator().manual_seed(0)
    truth, noise, other = torch.randn(3, 90_000, generator=drawn, dtype=torch.float64)
    tensors = {"large": 89_000, "norm": 900, "nearly nothing": 90, "zeros": 10}
    truth[89_900:] *= 1e-9
    truth[89_990:] = 0
    noise[89_900:] = other[89_900:] = 0
    plain = errors.yardstick(truth + 0.01 * noise, truth, tensors)
    found = truth + 0.01 * other
    assert errors.vector_figure(found, truth, plain, ranks=2).passes
    found[89_900:] += 1e-6  # not in relation to these tensors, but to all others
    assert errors.vector_figure(found, truth, plain, ranks=2).passes
    found[89_000:89_900] *= 1.05
    figure = errors.vector_figure(found, truth, plain, ranks=2)
    assert figure.ratio < 1.2
    assert figure.worst.tensor == "norm"
    assert figure.worst.relative == pytest.approx(0.05, rel=0.1)
    assert figure.worst.limit == pytest.approx(0.0165, rel=0.1)
    assert figure.as_dict()["worst"]["tensor"] == "norm"
    with pytest.raises(errors.CorrectnessError, match=r"gradient: relative error 0\.05\S* of norm"):
        errors.require({"gradient": figure}, "flat")
    found[89_000:89_900] = truth[89_000:89_900]
    found[89_990:] = 1e-3
    assert errors.vector_figure(found, truth, plain, ranks=2).worst.tensor == "zeros"


def test_a_few_entries_of_a_tensor_may_go_astray_where_that_is_said():
    truth = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = errors.yardstick(truth * (1 + 1e-3), truth, {"a": 1900, "norm": 100})
    plain = replace(plain, relative=0.1)  # as many others would make it
    found = truth.clone()
    found[1900] -= 2 * truth.square().mean().sqrt()
    assert errors.vector_figure(found, truth, plain, astray=1).passes
    assert not errors.vector_figure(found, truth, plain).passes


def test_require_names_the_figure_the_ratio_and_the_limit():
    truth = torch.ones(300, 300, dtype=torch.float64)
    bad = {"grad_input": errors.figure(truth * 1.2, truth, 0.1, ranks=2)}
    with pytest.raises(errors.CorrectnessError, match=r"grad_input.*0\.2 is 2 times.*1\.5"):
        errors.require(bad, "block_shock")


@pytest.mark.parametrize(("ranks", "bound"), [(1, 1.1), (2, 1.5), (3, 2.0), (4, 2.0), (8, 2.5)])
def test_limits_are_the_designs(ranks, bound):
    assert errors.limit(ranks, 2**20) == bound
    assert errors.limit(ranks, 100) == pytest.approx(1.3 * bound)


def test_the_floor_is_the_largest_of_its_terms():
    cost = floor.Cost(1e9, 4e6, 1e6, 2e5, 3e5)
    forward = floor.step_floor(cost, CEILINGS, phase="forward", dtype="bf16")
    assert forward == {"seconds": 5e-3, "compute": 1e-3, "memory": 5e-3, "wire": 2e-3}
    training = floor.step_floor(
        cost, CEILINGS, phase="training", dtype="bf16", optimizer="adam", trained_bytes=2e6
    )
    assert training["compute"] == pytest.approx(3e-3)
    assert training["memory"] == pytest.approx((2 * 4e6 + 3 * 1e6 + 8 * 2e6) / 1e9)
    assert training["wire"] == pytest.approx(5e-3)


def test_wire_bytes_are_those_of_the_best_algorithms():
    assert floor.all_reduce_wire(100, 2) == 100
    assert floor.all_reduce_wire(100, 4) == 150
    assert floor.all_gather_wire(100, 4) == 75
    assert floor.all_reduce_wire(100, 1) == 0


@pytest.mark.gpus(1)
def test_no_graph_is_destroyed_by_a_collection_during_a_capture():
    def forgotten():
        cycle = [clock.capture(lambda: torch.zeros(8, device="cuda").add_(1))]
        cycle.append(cycle)

    forgotten()
    enabled, seen = gc.isenabled(), []

    def step():
        seen.append(gc.isenabled())
        cycles = [[] for _ in range(2000)]  # more than enough for a collection, were it allowed
        for cycle in cycles:
            cycle.append(cycle)
        torch.zeros(8, device="cuda").add_(1)

    clock.capture(step).replay()
    assert seen == [True, False]  # the warm-up, and the capture
    assert gc.isenabled() == enabled
