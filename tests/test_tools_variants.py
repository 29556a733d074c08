"""Kernels and reduces: labels tell them apart, the right lines decide, old files still count."""

import itertools
import random

import pytest

from blockshock.linear import METHODS
from blockshock.phases.linear.case import LinearCase as Case
from blockshock.phases.linear.case import choices, usual
from tests import synthetic_results as synthetic
from tools import compare, summary
from tools.cases import interleaved, over
from tools.families.linear.hypotheses import judge_all
from tools.families.linear.naming import VARIANTS, setting
from tools.families.linear.opponents import SAME_SUM
from tools.families.linear.readme_tables import readme
from tools.results import load, load_all, load_by_device

NEW_FIELDS = ("kernel", "reduce")
NCCL = "dense TP (NCCL)"


def old(entry):
    """The entry as it was written before kernels and reduces had names."""
    del entry["extra_info"]["usual"]
    for name in NEW_FIELDS:
        del entry["extra_info"]["case"][name]
    return entry


def read(tmp_path, entries, name="a", **options):
    return load(synthetic.write(tmp_path / f"{name}.json", entries, **options))


@pytest.mark.parametrize(
    ("method", "changes", "label"),
    [
        ("dense_single", {}, "dense_single"),
        ("dense_tp_row", {}, "dense_tp_row"),
        ("dense_tp_row", {"reduce": "auto"}, "dense_tp_row · auto reduce"),
        ("dense_tp_row", {"reduce": "exchange"}, "dense_tp_row · exchange"),
        ("block_shock", {"kernel": "cusparselt"}, "block_shock · cusparselt"),
        ("block_shock_folded", {"kernel": "auto"}, "block_shock_folded · auto kernel"),
        (
            "block_shock",
            {"mask": "1100", "kernel": "thin", "reduce": "collective"},
            "block_shock · 1100 · thin · collective",
        ),
        (
            "block_shock",
            {"phase": "training", "policy": "packed_master", "kernel": "thin"},
            "block_shock · packed_master · thin",
        ),
    ],
)
def test_a_label_names_what_is_unusual_and_nothing_else(tmp_path, method, changes, label):
    (result,) = read(tmp_path, [synthetic.entry(method, 64, 1, **changes)]).results
    assert result.label == label


def told(results):
    return [(v.sentence, [(j.title, j.words) for j in v.judgements]) for v in judge_all(results)]


def test_an_old_file_has_the_same_labels_points_and_verdict(tmp_path):
    entries = synthetic.everything((4096, 8192), (64, 1024), optimizers=("sgd",))
    new = read(tmp_path, entries)
    before = read(tmp_path, [old(entry) for entry in entries], "old")
    assert [r.label for r in before.results] == [r.label for r in new.results]
    assert told(before) == told(new)


def test_kernel_and_reduce_belong_to_the_line_not_to_the_setting(tmp_path):
    entries = [synthetic.entry(m, 64, 1, **changed) for m, changed in synthetic.VARIANTS]
    found = read(tmp_path, entries).results
    assert len({setting(result.case) for result in found}) == 1
    assert len({result.label for result in found}) == len(synthetic.VARIANTS)


def test_variants_of_one_run_were_measured_in_turn(tmp_path):
    found = read(tmp_path, synthetic.everything((64,), (1,), variants=synthetic.VARIANTS))
    for phase in ("forward", "training"):
        results = found.of(phase)
        assert all(interleaved([results[0], other]) for other in results)
    assert any("reduce=exchange" in result.run_label for result in found.of("training"))


def test_the_tools_name_a_line_as_the_run_does(tmp_path):
    """`interleaved_with` is written by the run and read here: both must spell it alike."""
    entries, labels = [], {}
    for method, cls in METHODS.items():
        named = [{}] + [{name: value} for name in VARIANTS for value in choices(cls, name)[1:]]
        for changes, policy in itertools.product(named, [None, *cls.policies]):
            phase = "training" if policy else "forward"
            case = Case(method=method, phase=phase, N=64, B=1, policy=policy, **changes)
            entry = synthetic.entry(method, 64, 1, phase=phase)
            entry["extra_info"] |= {
                "id": case.id,
                "case": case.as_dict(),
                "usual": {name: usual(cls, name) for name in VARIANTS},
            }
            entries.append(entry)
            labels[case.id] = case.label
    found = read(tmp_path, entries).results
    assert {result.id: result.run_label for result in found} == labels


def test_rounds_of_one_run_are_resampled_together(tmp_path):
    chance = random.Random(0)
    wander = [1 + 0.2 * chance.random() for _ in range(30)]
    entries = [
        synthetic.entry(method, 64, 1, data=[1e-3 * scale * w for w in wander])
        for method, scale in (("dense_tp_row", 1.0), ("block_shock", 1.1))
    ]
    dense, shock = read(tmp_path, entries).results
    assert over(shock, dense).high - over(shock, dense).low < 1e-6
    for entry in entries:
        entry["extra_info"]["timing"]["interleaved_with"] = []
    dense, shock = read(tmp_path, entries, "apart").results
    assert over(shock, dense).high - over(shock, dense).low > 1e-2


@pytest.mark.parametrize("new_first", [True, False])
def test_a_field_that_one_file_lacks_is_unknown_not_different(tmp_path, new_first):
    data = synthetic.samples(1e-3)
    new = read(tmp_path, [synthetic.entry("block_shock", 64, 1, data=data)])
    before = read(tmp_path, [old(synthetic.entry("block_shock", 64, 1, data=data))], "old")
    (row,) = compare.compare(*(([new], [before]) if new_first else ([before], [new]))).rows
    assert (row.verdict, row.note) == ("same", "")


def test_a_field_that_both_files_have_is_compared_null_too(tmp_path):
    def other(name, **changes):
        entry = synthetic.entry("block_shock", 64, 1)
        entry["extra_info"]["case"] |= changes
        return read(tmp_path, [entry], name)

    for changes in ({"reduce": "exchange"}, {"kernel": None}, {"heads": 2}):
        value = next(iter(changes.values()))
        first = other("a", **dict.fromkeys(changes, 1 if value == 2 else "auto"))
        (row,) = compare.compare([first], [other("b", **changes)]).rows
        assert row.verdict == "unsure"
        assert next(iter(changes)) in row.note


def test_cold_caches_are_named_and_never_mixed_in_silence(tmp_path):
    paths = []
    for name in ("warm", "cold"):
        entry = synthetic.entry("dense_tp_row", 64, 1)
        entry["extra_info"]["timing"]["l2"] = name
        paths.append(synthetic.write(tmp_path / f"{name}.json", [entry]))
    assert "cold L2" in load(paths[1]).title
    assert "cold L2" not in load(paths[0]).title
    assert "cold L2" in summary.full_tables(load_by_device(paths[1:]))
    assert any("warm caches" in note for note in load_all(paths).notes)
    (row,) = compare.compare([load(paths[0])], [load(paths[1])]).rows
    assert row.note == "timing l2: warm → cold"


GRID = [(n, b) for n in (4096, 8192) for b in (64, 1024)]


def grid(lines, **options):
    """One entry for each size and (method, changes, milliseconds)."""
    return [
        synthetic.entry(method, n, b, seconds=1e-3 * ms, **changes, **options)
        for n, b in GRID
        for method, changes, ms in lines
    ]


DENSE = [("dense_tp_row", {}, 1.0), ("dense_tp_column", {}, 1.3)]


def h(tmp_path, name, lines):
    return next(v for v in judge_all(read(tmp_path, grid(lines))) if v.name == name)


def statuses(judgements):
    return {one.title: one.status for one in judgements}


def test_h1_is_judged_against_dense_tp_as_users_run_it_and_with_the_same_sum(tmp_path):
    lines = [*DENSE, ("dense_tp_row", {"reduce": "auto"}, 0.5), ("block_shock", {}, 0.8)]
    found = h(tmp_path, "H1", lines)
    assert statuses(found.deciding) == {
        f"tile vs {NCCL}": "holds",
        f"tile vs {SAME_SUM}": "fails",
    }
    assert found.sentence == f"Holds for tile against {NCCL}; fails for tile against {SAME_SUM}."
    same = found.deciding[1]
    assert {point.against for point in same.points} == {"dense_tp_row · auto reduce"}
    assert same.points[0].ratio.value == pytest.approx(1.6)


def test_a_dense_method_without_that_reduce_stands_as_it_usually_is(tmp_path):
    column = [("dense_tp_row", {}, 1.0), ("dense_tp_column", {}, 0.4)]
    lines = [*column, ("dense_tp_row", {"reduce": "auto"}, 0.5), ("block_shock", {}, 0.8)]
    same = next(j for j in h(tmp_path, "H1", lines).deciding if j.opponent == SAME_SUM)
    assert {point.against for point in same.points} == {"dense_tp_column"}
    assert not any(point.note for point in same.points)


def test_no_second_opponent_where_the_reduce_is_the_same(tmp_path):
    lines = [*DENSE, ("block_shock", {"reduce": "collective"}, 0.8)]
    (one,) = h(tmp_path, "H1", lines).judgements
    assert (one.opponent, one.decides) == (NCCL, False)


@pytest.mark.parametrize("changes", [{"kernel": "cusparselt"}, {"reduce": "exchange"}])
def test_only_usual_kernels_and_reduces_decide_h1(tmp_path, changes):
    lines = [*DENSE, ("block_shock", {}, 1.5), ("block_shock", changes, 0.5)]
    found = h(tmp_path, "H1", lines)
    assert statuses(found.deciding) == {f"tile vs {NCCL}": "fails"}
    assert [one.status for one in found.beside] == ["holds"]
    alone = h(tmp_path, "H1", [*DENSE, ("block_shock", changes, 0.5)])
    assert alone.sentence.startswith("Not measured")


def test_each_mask_is_judged_by_itself(tmp_path):
    two = [*DENSE, ("block_shock", {}, 1.5), ("block_shock", {"mask": "1100"}, 0.5)]
    found = h(tmp_path, "H1", two)
    assert statuses(found.deciding) == {f"tile vs {NCCL}": "fails", f"1100 vs {NCCL}": "holds"}
    three = h(tmp_path, "H1", [*two, ("block_shock", {"mask": "random"}, 1.5)])
    assert three.sentence == f"Holds for 1100, fails for tile and random against {NCCL}."


def trained(ms, *, dense=1.0, **changes):
    """Training and forward entries of one Block-Shock line beside dense TP."""
    lines = [("dense_tp_row", {}, 1.0), ("dense_tp_column", {}, 1.3)]
    lines += [("dense_tp_row", {"reduce": "auto"}, dense)]
    step = {"phase": "training", "optimizer": "sgd"}
    entries = grid([*lines, ("block_shock", changes, 0.8)])
    entries += grid([(m, c | {"policy": "plain"}, v) for m, c, v in lines], **step)
    return entries + grid([("block_shock", changes | {"policy": "dense_master"}, ms)], **step)


def test_h2_compares_a_line_with_its_own_forward_and_reduces_with_their_own(tmp_path):
    usual, same = judge_all(read(tmp_path, trained(1.5, dense=0.5)))[1].deciding
    assert (usual.opponent, same.opponent) == (NCCL, SAME_SUM)
    assert usual.points[0].ratio.value == pytest.approx(1.5)
    assert same.points[0].ratio.value == pytest.approx(3.0)
    assert same.points[0].forward.value == pytest.approx(1.6)
    other = judge_all(read(tmp_path, trained(1.5, kernel="cusparselt")))[1]
    assert other.beside
    assert not other.deciding


def test_h3_needs_the_same_mask_and_the_same_reduce(tmp_path):
    lines = [("masked_split", {}, 1.0), ("block_shock", {}, 0.5)]
    assert statuses(h(tmp_path, "H3", lines).deciding) == {"tile vs block_shock": "holds"}
    for apart in ({"mask": "1100"}, {"reduce": "exchange"}):
        assert h(tmp_path, "H3", [lines[0], ("block_shock", apart, 0.5)]).judgements == ()
    both = [*lines, ("block_shock", {"kernel": "cusparselt"}, 2.0)]
    assert [(j.opponent, j.status, j.decides) for j in h(tmp_path, "H3", both).judgements] == [
        ("block_shock", "holds", True),
        ("block_shock · cusparselt", "fails", False),
    ]


def test_verdict_and_readme_show_one_interval_for_one_ratio(tmp_path):
    results = read(tmp_path, synthetic.everything((4096, 8192), (64, 1024)))
    table = readme(results).table
    (one,) = judge_all(results)[0].deciding
    assert len(one.points) == 4
    for point in one.points:
        assert f"| {point.ratio} |" in table
        at = {
            r.label: r for r in results.of("forward") if (r.case.N, r.case.B) == (point.N, point.B)
        }
        assert over(at["block_shock"], at[point.against]) == point.ratio
