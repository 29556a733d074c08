"""What was fastest at a size is taken for its class of sizes, kept for this machine, agreed on."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from blockshock import cache, tuning
from blockshock.distributed import reduce
from blockshock.phases.linear.case import LinearCase as Case
from blockshock.phases.linear.lessons import lessons
from blockshock.tuning import answers as answers_file
from blockshock.tuning import race, sizes
from tests import tuning_jobs as jobs
from tests.tuning_jobs import GivenTimes

CPU = torch.device("cpu")
TIMES = {
    "folded; collective": 3.0,
    "folded; exchange, 4 chunks": 2.0,
    "folded; exchange, 8 chunks": 2.1,
    "thin; collective": 5.0,
    "thin; exchange, 4 chunks": 1.0,  # would win, but its first is far behind
    "cusparselt; collective": 3.5,
    "cusparselt; exchange, 4 chunks": 2.9,
}


def steps(times=TIMES):
    kinds = {}
    for name in times:
        kinds.setdefault(name.partition(";")[0], {})[name] = lambda: None
    return kinds


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """tuned(times) -> the answer for one question; files are in `tmp_path`."""

    def ask(times=TIMES, question="layer forward: B=64"):
        jobs.stand_ins(monkeypatch, tmp_path, times)
        return tuning.pick(question, steps(times), CPU)

    yield ask
    tuning.forget()
    tuning.exact_sizes(False)


def kept_file(folder):
    (file,) = folder.glob("ways-*.json")
    return file


def test_the_fastest_is_taken_and_kinds_far_behind_do_not_enter(tuned):
    answer = tuned()
    assert (answer.name, answer.source) == ("folded; exchange, 4 chunks", "measured")
    assert "thin; exchange, 4 chunks" not in GivenTimes.last.entered
    assert GivenTimes.last.entered[:3] == [name for name in TIMES if "collective" in name]
    near = ["folded; exchange, 4 chunks", "folded; exchange, 8 chunks"]
    assert GivenTimes.last.ran == [(rounds, near) for _, rounds in tuning.RIVALS]
    assert tuning.known("layer forward: B=64") is answer


def test_an_answer_is_kept_on_disk_with_its_runners_up(tuned, tmp_path):
    tuned()
    again = tuned(OTHER)
    assert (again.name, again.source) == ("folded; exchange, 4 chunks", "kept")
    assert again.seconds["folded; exchange, 8 chunks"] == 2.1
    content = json.loads(kept_file(tmp_path).read_text())
    assert content["holds for"]["torch"] == torch.__version__
    assert content["holds for"]["device"] == "Some-GPU"


OTHER = {name: 1 / seconds for name, seconds in TIMES.items()}  # another one is the fastest


def test_nothing_is_taken_from_another_class_of_sizes(tuned):
    tuned()
    answer = tuned(OTHER, question="layer forward: B=65")
    assert (answer.name, answer.source) == ("thin; collective", "measured")


def test_another_size_of_a_class_takes_its_answer_and_says_so(tuned, tmp_path):
    tuned(question="layer forward: B=100")
    for again in ("from memory", "from the disk"):
        found = tuning.pick("layer forward: B=99", steps(OTHER), CPU)
        source = "measured" if again == "from memory" else "kept"
        assert (found.name, found.source) == (
            "folded; exchange, 4 chunks", f"{source}, of B=100"
        )  # fmt: skip
        tuning.forget()
    assert "layer forward: B=99" not in json.loads(kept_file(tmp_path).read_text())


def test_a_size_that_was_measured_is_answered_by_its_own_times(tuned):
    tuned(question="layer forward: B=100")
    tuning.exact_sizes()
    answer = tuned(OTHER, question="layer forward: B=99")
    assert (answer.name, answer.source) == ("thin; collective", "measured")
    tuning.exact_sizes(False)
    tuning.forget()
    found = [tuning.pick(f"layer forward: B={B}", steps(), CPU) for B in (97, 100, 99)]
    assert [(answer.name, answer.source) for answer in found] == [
        ("thin; collective", "kept, of B=99"),
        ("folded; exchange, 4 chunks", "kept"),
        ("thin; collective", "kept"),
    ]


def test_a_size_without_the_way_of_its_class_measures_once_for_those_like_it(tuned):
    tuned(question="layer forward: B=100")
    fewer = {name: seconds for name, seconds in OTHER.items() if "4 chunks" not in name}
    sources = [
        tuning.pick(f"layer forward: B={B}", steps(fewer), CPU).source for B in (110, 111, 105)
    ]
    assert sources == ["measured", "measured, of B=110", "measured, of B=110"]


def test_switching_classes_off_forgets_what_came_from_another_size(tuned):
    tuned(question="layer forward: B=100")
    tuning.pick("layer forward: B=99", steps(), CPU)
    tuning.exact_sizes()
    assert tuning.known("layer forward: B=99") is None
    assert tuning.pick("layer forward: B=99", steps(), CPU).source == "measured"
    assert tuning.pick("layer forward: B=100", steps(), CPU).source == "kept"


def test_an_answer_of_another_size_teaches_nothing(tuned, tmp_path):
    tuned(question="layer forward: B=100")
    tuning.pick("layer forward: B=99", steps(), CPU)
    before = kept_file(tmp_path).read_text()
    tuning.learn("layer forward: B=99", "thin; collective", 0.5)
    assert kept_file(tmp_path).read_text() == before


@pytest.mark.parametrize(
    ("rows", "span"),
    [
        (1, (1, 8)), (8, (1, 8)), (9, (9, 16)), (63, (57, 64)), (64, (57, 64)),
        (65, (65, 128)), (128, (65, 128)), (129, (129, 192)),
        (255, (193, 255)), (256, (256, 256)), (257, (257, 320)),
        (511, (449, 511)), (512, (512, 512)), (513, (513, 576)),
        (1023, (961, 1023)), (1024, (1024, 1024)), (1025, (1025, 1152)), (2048, (1921, 2048)),
        (2049, (2049, 2304)), (40960, (36865, 40960)), (40961, (40961, 45056)),
    ],
)  # fmt: skip
def test_classes_end_at_these_rows(rows, span):
    assert sizes.span(rows) == span


def test_every_number_of_rows_is_in_one_class_narrow_enough():
    at, found = 1, 0
    while at <= 1 << 16:
        first, last = sizes.span(at)
        assert all(sizes.span(rows) == (first, last) for rows in {at, (at + last) // 2, last})
        assert first == at
        assert last - first < (8 if last <= 64 else max(64, first / 8))
        at, found = last + 1, found + 1
    assert found == 8 + 15 + len(sizes.CUTS) + 8 * 6


def test_rows_of_one_class_have_the_same_ways(monkeypatch):
    monkeypatch.setattr(reduce.collectives, "group_size", lambda group=None: 2)
    monkeypatch.setattr(reduce.symmetric, "why_not", lambda group=None: None)
    monkeypatch.setattr(reduce.symmetric, "PUSH_BYTES", 1 << 40)  # the one limit beside rows
    at = 1
    while at < 5000:
        _, last = sizes.span(at)
        ways = [
            reduce.plans("auto", rows, 64, torch.bfloat16, torch.device("cuda"))
            for rows in (at, last)
        ]
        assert ways[0] == ways[1]
        at = last + 1


def test_a_question_names_its_class():
    assert sizes.split("layer forward: N=64 B=100 bf16") == (
        "layer forward: N=64 B=65..128 bf16", 100
    )  # fmt: skip
    assert sizes.split("no rows") == ("no rows", 0)


def picked(monkeypatch, unable):
    monkeypatch.setattr(GivenTimes, "unable", {kind: RuntimeError("it is full") for kind in unable})
    trials = {kind: lambda kind=kind: kind for kind in steps()}
    return tuning.pick("another layer", steps(), CPU, trials=trials)


def test_a_kind_that_a_rank_cannot_run_is_left_out_and_told(tuned, monkeypatch, caplog):
    tuned()
    answer = picked(monkeypatch, {"folded"})
    assert answer.name == "cusparselt; exchange, 4 chunks"
    assert not [name for name in GivenTimes.last.entered if name.startswith("folded")]
    assert "folded is left out of the choice: it is full" in caplog.text


def test_where_no_kind_can_run_its_own_error_is_raised(tuned, monkeypatch):
    tuned()
    with pytest.raises(RuntimeError, match="it is full"):
        picked(monkeypatch, {"folded", "thin", "cusparselt"})


def test_what_stands_in_for_a_question_is_asked_only_where_nothing_was_learned(tuned, tmp_path):
    other, asked = tuned(), []

    def stand_in():
        asked.append(1)
        return other

    names = {"kernel": {name: lambda: None for name in ("folded; collective", "thin; collective")}}
    for _ in range(2):
        found = tuning.pick("in fp16", names, CPU, stand_in=stand_in)
        assert (found.name, len(asked)) == ("folded; collective", 1)
    tuning.learn("in fp16", "thin; collective", 0.5)
    tuning.forget()
    found = tuning.pick("in fp16", names, CPU, stand_in=stand_in)
    assert (found.name, found.source, len(asked)) == ("thin; collective", "kept", 1)


def test_rounds_end_after_a_time(monkeypatch):
    contest = race.Race.__new__(race.Race)
    contest.shared, contest.device = False, CPU
    contest.graphs = {"a": (None, 16), "b": (None, 16)}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for seconds, rounds in ((1e-6, 31), (1e-3, 14), (1.0, race.FEWEST_ROUNDS)):
        samples = []
        contest.seconds = dict.fromkeys("ab", seconds)
        contest._sample = lambda name, s=seconds, to=samples: to.append(name) or (lambda: s)
        contest.run(["a", "b"], 31)
        assert samples.count("a") == samples.count("b") == rounds


def test_another_driver_or_library_measures_anew(tuned, tmp_path, monkeypatch):
    tuned()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert tuned(OTHER).source == "measured"
    assert len(list(tmp_path.glob("ways-*.json"))) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"x"', "\x00", '{"layer forward: B=64": 3}']
    + [f'{{"layer forward: B=64": {entry}}}' for entry in ('{"way": "x"}', '{"seconds": {}}')]
    + ['{"layer forward: B=64": {"way": "gone; by now", "seconds": {"gone; by now": 1}}}'],
)
def test_a_torn_or_foreign_file_costs_a_measurement_and_is_mended(tuned, tmp_path, text):
    tuned()
    kept_file(tmp_path).write_text(text)
    assert tuned().source == "measured"
    assert json.loads(kept_file(tmp_path).read_text())["holds for"]
    assert tuned().name == "folded; exchange, 4 chunks"
    tuning.forget()
    assert tuned().source == "kept"


def test_without_measuring_the_first_candidate_is_the_rule_and_says_so(tuned, monkeypatch):
    monkeypatch.setenv("BLOCKSHOCK_TUNE", "0")
    answer = tuned()
    assert answer.name == "folded; collective"
    assert answer.source == "by rule: BLOCKSHOCK_TUNE=0"
    monkeypatch.delenv("BLOCKSHOCK_TUNE")
    tuned()
    monkeypatch.setenv("BLOCKSHOCK_TUNE", "0")
    assert tuned().source == "kept"  # what is on disk still counts


def test_a_full_disk_costs_nothing_but_the_next_measurement(tuned, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", full)
    assert tuned().source == "measured"
    assert not list(tmp_path.glob("*.json"))


def test_files_are_whole_and_what_two_jobs_add_is_all_there(tmp_path):
    file = tmp_path / "deep" / "x.json"
    assert cache.add(file, {"a": 1}) == {"a": 1}
    assert cache.add(file, {"a": 2, "b": 2}) == {"a": 1, "b": 2}  # the first one stays
    assert cache.add(file, {"a": 3}, replace=True) == {"a": 3, "b": 2}
    assert cache.read(file) == {"a": 3, "b": 2}
    assert list(file.parent.iterdir()) == [file]


def test_jobs_that_write_at_once_lose_nothing_of_each_others(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{")  # and a torn file before them
    with ThreadPoolExecutor(8) as jobs_:  # a lock on a file of its own holds threads apart as well
        list(jobs_.map(lambda number: cache.add(file, {str(number): number}), range(100)))
    assert cache.read(file) == {str(number): number for number in range(100)}
    assert list(tmp_path.iterdir()) == [file]


def test_a_clearly_faster_one_is_learned_in_memory_and_on_disk(tuned):
    question = "layer forward: B=64"
    tuned()
    tuning.learn(question, "folded; exchange, 8 chunks", 0.75)  # of 2.0
    assert tuning.known(question).name == "folded; exchange, 8 chunks"
    again = tuned()
    assert (again.name, again.source) == ("folded; exchange, 8 chunks", "kept")
    assert again.seconds["folded; exchange, 8 chunks"] == 1.5


def test_what_nobody_asked_is_not_learned(tuned, tmp_path):
    tuned()
    before = kept_file(tmp_path).read_text()
    tuning.learn("another question", "folded; exchange, 8 chunks", 1.5)
    assert kept_file(tmp_path).read_text() == before


def test_the_first_use_that_measures_is_told_once(tuned, caplog):
    with caplog.at_level(logging.INFO, "blockshock.tuning"):
        tuned()
        tuning.pick("another", steps(), CPU)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "BLOCKSHOCK_TUNE=0" in warned[0].getMessage()
    assert sum("measured in" in record.getMessage() for record in caplog.records) == 2


def test_memory_is_bounded(tuned, monkeypatch):
    tuned()
    monkeypatch.setattr(answers_file, "MOST", 3)
    for number in range(10):
        tuning.pick(f"question {number}", steps(), CPU)
    memory = tuning._memory.of()
    assert len(memory.answers) == len(memory.settled) == 3
    assert tuning.known("question 9")


def test_a_rank_of_two_groups_forgets_what_the_others_forget(tuned, monkeypatch):
    class Group:
        pass

    pair, everyone = Group(), Group()
    monkeypatch.setattr(answers_file, "MOST", 3)
    for group, number in ((pair, 1), (everyone, 3)):
        for asked in range(number):
            tuning.remember(f"question {asked}", tuning.Answer("a", "kept"), group)
    tuning.remember("question 2", tuning.Answer("b", "kept"), everyone)  # again: nothing goes
    assert tuning.known("question 0", pair)
    assert tuning.known("question 0", everyone)


def test_what_was_learned_is_the_fastest_of_its_times(tuned):
    times = {"a; x": 1.0, "a; y": 1.02, "a; z": 1.01}
    tuned(times)
    tuning.learn("layer forward: B=64", "a; y", 0.9)
    assert tuning.known("layer forward: B=64").of(times).name == "a; y"


def test_ranks_take_the_first_ones_answer_whatever_their_own_files_say(ranks, tmp_path):
    times = {"kernel; collective": 2.0, "kernel; exchange, 4 chunks": 1.0}
    questions = ["a", "b", "a"]
    answers = ranks.run(jobs.asked_in_turn, str(tmp_path), questions, times)
    assert answers == [[("kernel; exchange, 4 chunks", "measured")] * 3] * ranks.size
    assert list((tmp_path / "0").glob("ways-*.json"))
    assert not (tmp_path / "1").exists()


def test_a_loop_over_many_sizes_asks_once_a_class(ranks, tmp_path):
    classes = len({sizes.span(B) for B in jobs.MANY})
    for asked, again, memory, names in ranks.run(jobs.many_sizes, str(tmp_path)):
        assert asked == classes
        assert again == 0
        assert memory == (len(jobs.MANY), classes)
        assert names == {"kernel; exchange, 4 chunks"}


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("method", "options"),
    [("dense_tp_row", {}), ("block_shock", {"mask": "1100", "kernel": "folded"})],
)
def test_a_loop_over_many_sizes_neither_stalls_nor_grows(ranks, method, options):
    for found in ranks.run(jobs.serving_loop, method, 2048, **options, timeout=600):
        assert found["asked"] <= 3 * found["classes"]  # forward, and dX alone or beside dW
        assert found["asked again"] == 0
        assert found["symmetric"][0] == found["symmetric"][1]
        assert found["reserved"][1] - found["reserved"][0] <= 64 << 20
        assert found["largest ms"] < 100


@pytest.mark.gpus(2)
@pytest.mark.parametrize("mask", ["tile", "1100"])
def test_a_size_first_used_inside_a_capture_goes_by_rule_and_says_so(ranks, mask):
    for error, path, answers in ranks.run(
        jobs.captured_before_its_first_use, "block_shock", 1024, 64, mask=mask, kernel="thin"
    ):
        assert error < 1.5 * torch.finfo(torch.bfloat16).eps
        assert path == "collective (by rule: a graph was being captured)"
        assert not answers  # nothing was settled: a later eager call measures


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("method", "B", "dtype", "options"),
    [
        ("block_shock", 1536, "bf16", {"mask": "tile"}),
        ("block_shock", 63, "bf16", {"mask": "1100"}),
        ("block_shock", 333, "fp16", {"mask": "tile"}),
        ("block_shock", 8, "bf16", {"mask": "random", "master": "dense"}),
        ("dense_tp_row", 1536, "bf16", {}),
        ("dense_tp_column", 63, "fp16", {}),
        ("masked_split", 512, "bf16", {"mask": "tile"}),
    ],
)
def test_all_ranks_measure_once_and_take_the_same_way(ranks, method, B, dtype, options):
    found = ranks.run(jobs.first_use, method, 1152, B, dtype, **options, timeout=120)
    first = found[0][0]
    assert set(first) == {"forward", "backward, hidden"} or method == "dense_tp_column"
    for answers, paths, same, _ in found:
        assert same  # the second call, which measured nothing, repeats the first to the bit
        assert {side: a["way"] for side, a in answers.items()} == {
            side: a["way"] for side, a in first.items()
        }
        for answer in answers.values():
            assert answer["way"] == min(answer["seconds"], key=answer["seconds"].get)
            assert answer["took"] < 10
        assert "by rule" not in paths["reduce"]


def measured(kernel, reduce, way, samples, seconds=None):
    """A case of the laboratory with its result."""
    case = Case("forward", "block_shock", 512, 64, mask="tile", kernel=kernel, reduce=reduce)
    info = {"question": "the question", "way": way, "seconds": seconds or {}}
    timing = {"mode": "graph", "l2": "warm"}
    return case, samples, {"ways": {"forward": info}, "timing": timing}


AUTO = measured("auto", "auto", "a", [1.0] * 20, {"a": 1.0, "b": 1.1})


@pytest.mark.parametrize(
    ("rival", "learned"),
    [
        (measured("thin", "exchange", "b", [0.9] * 20), [("the question", "b", 0.9)]),
        (measured("thin", "auto", "b", [0.9] * 20), [("the question", "b", 0.9)]),
        (measured("thin", "exchange", "b", [0.99] * 20), []),  # within 2 %
        (measured("thin", "exchange", "b", [0.9] * 17 + [1.1] * 3), []),  # not in nine of ten
        (measured("thin", "exchange", "a", [0.9] * 20), []),  # the same way
        (measured("thin", "exchange", "c", [0.9] * 20), []),  # no candidate of the question
    ],
)
def test_the_laboratory_teaches_what_was_clearly_faster_beside_auto(rival, learned):
    assert lessons([AUTO, rival]) == lessons([rival, AUTO]) == learned


@pytest.mark.parametrize("timing", [{"mode": "events"}, {"mode": "sync"}, {"l2": "cold"}])
def test_times_of_another_kind_than_a_race_has_teach_nothing(timing):
    rival = measured("thin", "exchange", "b", [0.9] * 20)
    other = [(c, s, info | {"timing": info["timing"] | timing}) for c, s, info in (AUTO, rival)]
    assert lessons([AUTO, rival])
    assert lessons(other) == []


def test_another_layer_or_phase_teaches_nothing():
    rival = measured("thin", "exchange", "b", [0.9] * 20)
    for change in ({"mask": "1100"}, {"phase": "backward"}, {"method": "block_shock_folded"}):
        fields = {"kernel": None} if "method" in change else {}
        fields |= {"mask": "1100"} if "method" in change else {}
        case = replace(rival[0], **change | fields)
        assert lessons([AUTO, (case, *rival[1:])]) == []
