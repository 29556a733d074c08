"""What families show over ranks, from files of several numbers of them. Times are made up."""

import pytest

from tests import synthetic_data_parallel, synthetic_transformer
from tools import scaling, summary
from tools.families import FAMILIES
from tools.files import ToolError
from tools.results import load, load_by_card
from tools.verdict import judged

PARALLEL, TRANSFORMER = FAMILIES["data_parallel"].scaling, FAMILIES["transformer"].scaling


def file(tmp_path, ranks, entries, device="NVIDIA H200"):
    """A file whose cases were measured on so many ranks, each in seconds without noise."""
    for entry, seconds in entries:
        entry["extra_info"]["case"]["ranks"] = ranks
        entry["stats"] = {"data": [seconds] * 12}
    machine = {"device": f"{ranks}x {device}", "ranks": ranks}
    path = tmp_path / f"{device}-{ranks}.json"
    return str(synthetic_data_parallel.write(path, [entry for entry, _ in entries], **machine))


def training(tmp_path, times):
    """times: ranks -> method -> seconds."""
    entry = synthetic_data_parallel.entry
    return [
        file(tmp_path, ranks, [(entry(method), seconds) for method, seconds in found.items()])
        for ranks, found in times.items()
    ]


def decoding(tmp_path, times):
    """times: ranks -> (plan, sum) -> seconds."""
    timed = synthetic_transformer.timed
    return [
        file(
            tmp_path,
            ranks,
            [(timed("decode", plan, reduce=how), t) for (plan, how), t in found.items()],
        )
        for ranks, found in times.items()
    ]


def read(files):
    (results,) = load_by_card(files)
    return results


def lines(drawings):
    """Of each panel its title and lines: the points as (ranks, value)."""
    return {
        panel.title: {
            line.label: [(p.x, round(p.y, 4)) for p in line.points] for line in panel.lines
        }
        for drawing in drawings
        for panel in drawing.panels
    }


def cells(table):
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_training_is_held_to_the_fewest_ranks_to_none_and_to_the_peer(tmp_path):
    times = {
        1: {"none": 0.10, "overlapped": 0.10, "torch_ddp": 0.10},
        8: {"none": 0.11, "overlapped": 0.125, "torch_ddp": 0.15},
    }
    results = read(training(tmp_path, times))
    assert results.device == "NVIDIA H200"
    assert len(results.results) == 6
    (drawing,) = PARALLEL.figures["data_parallel_training_vs_ranks"](results)
    assert "ranks" not in drawing.subtitle
    assert lines([drawing])["124M, 32 × 1024 a rank"] == {
        "none": [(1, 1.0), (8, 0.9091)],
        "overlapped": [(1, 1.0), (8, 0.8)],
        "torch_ddp": [(1, 1.0), (8, 0.6667)],
    }
    (written,) = PARALLEL.tables(results)
    (row,) = (
        row for row in cells(written.table) if (row["method"], row["ranks"]) == ("overlapped", "8")
    )
    assert row["of the fewest ranks"].startswith("0.800 ")
    assert row["of none"].startswith("0.880 ")
    assert row["speed over torch_ddp"].startswith("1.200 ")


def test_plans_are_held_to_standard_on_as_many_ranks_and_on_the_fewest(tmp_path):
    times = {
        1: {("tp", "collective"): 0.008},
        2: {("tp", "collective"): 0.006, ("spd", "collective"): 0.005, ("spd", "exchange"): 0.004},
        8: {("tp", "collective"): 0.005, ("spd", "collective"): 0.004, ("spd", "exchange"): 0.002},
    }
    results = read(decoding(tmp_path, times))
    found = lines(TRANSFORMER.figures["transformer_decode_time_vs_ranks"](results))
    assert found == {
        "124M, batch 1, collective": {
            "24 syncs": [(1, 8.0), (2, 6.0), (8, 5.0)],
            "12 syncs": [(2, 5.0), (8, 4.0)],
        },
        "124M, batch 1, exchange": {"12 syncs": [(2, 4.0), (8, 2.0)]},
    }
    found = lines(TRANSFORMER.figures["transformer_decode_ratio_vs_ranks"](results))
    assert found["124M, batch 1, exchange"] == {"12 syncs": [(2, 0.6667), (8, 0.4)]}
    (written,) = TRANSFORMER.tables(results)
    (row,) = (r for r in cells(written.table) if (r["sum"], r["ranks"]) == ("exchange", "8"))
    assert row["over standard"].startswith("0.400 ")
    assert row["speed over standard on the fewest ranks"].startswith("4.000 ")


def test_the_hybrid_block_has_a_panel_for_strong_and_one_for_weak_scaling(tmp_path):
    def block(batch):
        return synthetic_transformer.block(
            "hybrid_forward", "sparse_attention", 8192, pattern="band(1024)", batch=batch
        )

    times = {1: {1: 0.010, 2: 0.020}, 2: {1: 0.006, 2: 0.0125}, 4: {1: 0.005, 4: 0.016}}
    files = [
        file(tmp_path, ranks, [(block(batch), seconds) for batch, seconds in found.items()])
        for ranks, found in times.items()
    ]
    results = read(files)
    name = "sparse_attention · band(1024)"
    assert lines(TRANSFORMER.figures["transformer_hybrid_forward_vs_ranks"](results)) == {
        "strong: width 4096, T 8192, batch 1": {name: [(1, 1.0), (2, 0.8333), (4, 0.5)]},
        "weak: width 4096, T 8192, batch 1 on 1 rank": {name: [(1, 1.0), (2, 0.8), (4, 0.625)]},
    }
    (written,) = TRANSFORMER.tables(results)
    assert written.words.startswith("Hybrid block, forward, over ranks")


def test_fewer_syncs_have_a_limit_of_their_own_on_eight_ranks(tmp_path):
    def verdicts(ranks):
        plans = {"tp": 0.005, "spd": 0.0043, "spd_2": 0.003}
        times = {ranks: {(plan, "collective"): t for plan, t in plans.items()}}
        (path,) = decoding(tmp_path, times)
        return {one.name: one for one in judged(load(path))}

    found = {name: [one.status for one in v.deciding] for name, v in verdicts(8).items()}
    assert found == {"T1": [], "T2": ["holds", "holds"], "T3": [], "T4": ["fails", "holds"]}
    assert "batch 1 on 8 ranks" in verdicts(4)["T4"].sentence


@pytest.mark.parametrize(("ranks", "decides"), [(8, True), (4, False)])
def test_training_on_eight_ranks_is_held_to_none_and_to_the_peer(tmp_path, ranks, decides):
    times = {"none": 0.090, "overlapped": 0.098, "sharded_optimizer": 0.104, "torch_ddp": 0.099}
    (path,) = training(tmp_path, {ranks: times})
    (verdict,) = judged(load(path))
    statuses = {
        (one.line.partition(" ")[0], one.opponent): one.status for one in verdict.judgements
    }
    assert statuses == {
        ("overlapped", "none"): "holds",
        ("overlapped", "torch_ddp"): "holds",
        ("sharded_optimizer", "none"): "fails",
        ("sharded_optimizer", "torch_ddp"): "fails",
    }
    assert {one.decides for one in verdict.judgements} == {decides}
    assert verdict.sentence.startswith("Not measured") == (not decides)


def test_the_page_of_results_has_a_part_over_ranks(tmp_path, capsys):
    files = training(tmp_path, {1: {"none": 0.1}, 2: {"none": 0.1}})
    assert summary.main(files) == 0
    assert "## NVIDIA H200, over ranks\n\nData parallel over ranks" in capsys.readouterr().out
    assert summary.main(files[:1]) == 0
    assert "over ranks" not in capsys.readouterr().out


def test_the_command_prints_tables_and_writes_plots(tmp_path, capsys):
    files = training(tmp_path, {n: {"none": 0.1, "overlapped": 0.1 + n / 1000} for n in (1, 2)})
    assert scaling.main([*files, "-o", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200" in said
    assert "| 124M | 32 | 1024 | overlapped | 2 |" in said
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"data_parallel_training_vs_ranks.png", "data_parallel_training_vs_ranks.svg"} == written


def test_one_number_of_ranks_and_two_kinds_of_gpu_are_refused(tmp_path):
    files = training(tmp_path, {2: {"none": 0.1}})
    with pytest.raises(
        ToolError, match="measured on two numbers of them; measure one with --ranks"
    ):
        scaling.main(files)
    entries = [(synthetic_data_parallel.entry("none"), 0.1)]
    files.append(file(tmp_path, 4, entries, "NVIDIA H100"))
    with pytest.raises(ToolError, match="files are of NVIDIA H200, NVIDIA H100: give files of one"):
        scaling.main(files)
