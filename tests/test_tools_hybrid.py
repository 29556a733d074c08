"""The hybrid block in the tools: over keys of a query, and over ranks. Times are made up."""

import pytest

from tests import synthetic_transformer as made
from tools.families.transformer import scaling
from tools.families.transformer.attended import by_keys
from tools.results import load


def block(seconds, pattern=None, *, T=32768, sparsity=0.5, batch=1, ranks=2, causal=True):
    """A case of the block that takes so many seconds in every round."""
    method = "sparse_attention" if pattern else "dense_attention"
    entry = made.block("hybrid_forward", method, T, pattern=pattern, batch=batch)
    info = entry["extra_info"]
    entry["stats"] = {"data": [seconds] * 12}
    info["case"] |= {"ranks": ranks, "causal": causal}
    info["rates"] |= {"sparsity": sparsity}
    info["id"] += "" if causal else "-causal=False"
    return entry


def read(tmp_path, entries, name="r.json", **machine):
    return load(made.write(tmp_path / name, entries, **machine))


def test_patterns_of_one_kind_are_a_line_over_their_keys(tmp_path):
    entries = [
        block(0.040),
        block(0.010, "band(256)", sparsity=1 - 2**-7),
        block(0.012, "band(1024)", sparsity=1 - 2**-5),
        block(0.020, "random_blocks(128,0.1)", sparsity=0.95),
        block(0.050, causal=False, sparsity=0.0),
    ]
    results = read(tmp_path, entries)
    (drawing,) = by_keys(results, "hybrid_forward", "speedup")
    (panel,) = drawing.panels
    lines = {line.label: [(p.x, p.y) for p in line.points] for line in panel.lines}
    assert lines == {
        "band": [(pytest.approx(256), 4.0), (pytest.approx(1024), pytest.approx(40 / 12))],
        "random_blocks": [(pytest.approx(0.05 * 32768), 2.0)],
    }
    (drawing,) = by_keys(results, "hybrid_forward", "time")
    labels = [line.label for line in drawing.panels[0].lines]
    assert labels == ["dense_attention", "band", "random_blocks", "floor"]


def table(tmp_path, times):
    """Rows of the table by (ranks, batch), from a file for each number of ranks."""
    results = []
    for ranks in sorted({ranks for ranks, _ in times}):
        entries = [
            block(seconds, "band(1024)", batch=batch, ranks=own)
            for (own, batch), seconds in times.items()
            if own == ranks
        ]
        results += read(tmp_path, entries, f"{ranks}.json").results
    return {(row["ranks"], row["batch"]): row for row in scaling.rows(results)}


def test_strong_scaling_keeps_the_work_and_weak_scaling_that_of_a_rank(tmp_path):
    times = {(1, 1): 10, (1, 4): 40, (2, 1): 6, (2, 2): 11, (4, 1): 4, (4, 4): 12.5}
    rows = table(tmp_path, {at: 1e-3 * ms for at, ms in times.items()})
    strong = {at: row["strong"] and round(row["strong"].value, 4) for at, row in rows.items()}
    weak = {at: row["weak"] and round(row["weak"].value, 4) for at, row in rows.items()}
    assert strong == {
        (1, 1): None, (1, 4): None, (2, 1): 0.8333, (2, 2): None, (4, 1): 0.625, (4, 4): 0.8,
    }  # fmt: skip
    assert weak == {
        (1, 1): None, (1, 4): None, (2, 1): None, (2, 2): 0.9091, (4, 1): None, (4, 4): 0.8,
    }  # fmt: skip
    assert rows[4, 4]["attention"] == "sparse_attention · band(1024)"


def test_another_mask_is_scaled_by_itself(tmp_path):
    one = [
        block(0.01, ranks=1),
        block(0.02, ranks=1, causal=False),
        block(0.01, "band(9)", ranks=1),
    ]
    found = [*read(tmp_path, one, "1.json").results]
    found += read(tmp_path, [block(0.006, ranks=2)], "2.json").results
    strong = [row["strong"] for row in scaling.rows(found)]
    assert [one and round(one.value, 3) for one in strong] == [None, 0.833, None, None]
