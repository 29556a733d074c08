"""Attention in the tools: what is compared, what is drawn, and that families do not meet."""

import json
import re

import pytest

from tests import synthetic_attention as made
from tests import synthetic_results as linear
from tools import compare, plot, report, verdict
from tools.drawing import render
from tools.families import FAMILIES, held
from tools.families.attention.page import tables
from tools.families.attention.points import (
    NAMING,
    attention,
    best_dense,
    by_point,
    dense_share,
    ideal,
    point_of,
    speed,
)
from tools.families.attention.readme_tables import full
from tools.families.attention.scaling import _comparable
from tools.families.attention.sparsity import _pushed
from tools.family import draw_all
from tools.results import load, load_all
from tools.stats import ratio

METHODS = tuple(made.RATES)
FIGURES = FAMILIES["attention"].figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def file(folder):
    return made.read_write(folder / "attention.json", made.everything())


@pytest.fixture(scope="module")
def results(file):
    return load(file)


@pytest.fixture(scope="module")
def drawn(results):
    drawings, absent = draw_all(results, FAMILIES["attention"])
    assert not absent
    return {drawing.name: drawing for drawing in drawings}


@pytest.fixture(scope="module")
def linear_file(folder):
    entries = linear.everything((64, 128), (1, 2), optimizers=("sgd",), policies=("plain",))
    return linear.write(folder / "linear.json", entries, device="1x NVIDIA H200")


def read(tmp_path, entries, **options):
    return load(made.read_write(tmp_path / "a.json", entries, **options))


def table_of(markdown):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.split("\n")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_every_figure_of_attention_is_drawn_and_says_device_and_dtype(drawn):
    assert set(drawn) == set(FIGURES)
    for drawing in drawn.values():
        assert drawing.subtitle == "1x NVIDIA H200 · bf16"


def test_no_text_of_a_figure_leaves_it_or_covers_its_legend(drawn):
    for drawing in drawn.values():
        figure = render.figure(drawing)
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        for box in boxes:
            assert box.x0 >= -1
            assert box.x1 <= figure.bbox.width + 1
        (legend,) = figure.legends
        assert legend.get_window_extent().x1 <= figure.bbox.width
        assert all(box.y0 >= legend.get_window_extent().y1 for box in boxes)


def test_bars_are_the_measured_throughput(results, drawn):
    drawing = drawn["attention_forward_by_tier"]
    panel = drawing.panels[0]
    assert panel.title == "D = 64, full"
    shown = ("small", "medium", "large", "XXL", "long")
    wanted = {
        (r.case.method, r.rates["tflops"])
        for r in attention(results, "forward")
        if point_of(r.case).tier in shown
        and (point_of(r.case).D, point_of(r.case).causal) == (64, False)
    }
    assert wanted < {(one.label, p.y) for one in panel.lines for p in one.points}
    assert panel.names[0] == "small\n512"
    assert "rectangular\n16384×4096" in panel.names
    axes = render.figure(drawing).axes[0]
    heights = sorted(patch.get_height() for patch in axes.patches)
    assert heights == sorted(p.y for one in panel.lines for p in one.points)


def test_the_table_of_ratios_compares_with_the_fastest_peer(tmp_path):
    times = {"sdpa_flash": 2.0, "sdpa_cudnn": 1.0, "flex": 4.0, "flash_triton": 0.5}
    entries = [
        made.entry(method, *sizes, seconds=time)
        for method, time in times.items()
        for sizes in ((512, 512), (512, 1024))
    ]
    ratios = tables(read(tmp_path, entries))[0]
    assert "flash_triton / best peer" in [column.title for column in ratios.columns]
    assert [row["best peer"].value for row in ratios.rows] == pytest.approx([2.0, 2.0])


def test_speedups_are_over_the_best_dense_kernel_of_the_same_sizes(results):
    every = attention(results, "forward")
    sparse = [r for r in every if r.case.method == "block_sparse" and not decoders(r)]
    assert sparse
    for result in sparse:
        dense = best_dense(result, every)
        point, other = point_of(result.case), point_of(dense.case)
        assert (other.pattern, dense.case.method) == (None, "sdpa_cudnn")
        same = ("batch", "heads", "Tq", "Tk", "D", "dtype", "causal")
        assert all(getattr(point, name) == getattr(other, name) for name in same)
        assert ideal(result) == pytest.approx(result.pattern["touched_ideal_speedup"])
    flex = [r for r in every if r.case.method == "flex" and point_of(r.case).pattern]
    flex = [r for r in flex if not decoders(r)]
    assert all(ideal(r) == pytest.approx(r.pattern["ideal_speedup"]) for r in flex)


def decoders(result):
    """Whether its pattern is causal by itself; the synthetic run has no causal dense kernel."""
    return point_of(result.case).pattern.startswith("causal")


@pytest.mark.parametrize(("pattern", "causal"), [("band(64)", True), ("causal_band(64)", False)])
def test_a_causal_pattern_is_compared_with_causal_dense_and_its_ideal_is_less(
    tmp_path, pattern, causal
):
    more = {"causal": causal, "hidden": (0.75, 0.75)}
    entries = [
        made.entry("block_sparse", 512, pattern=pattern, **more),
        made.entry("sdpa_cudnn", 512, causal=True, seconds=3.0),
        made.entry("sdpa_cudnn", 512, seconds=1.0),
    ]
    results = read(tmp_path, entries)
    sparse = next(r for r in results.results if r.case.method == "block_sparse")
    dense = best_dense(sparse, results.results)
    assert point_of(dense.case).causal
    assert ideal(sparse) == pytest.approx(4 * dense_share(point_of(dense.case)))
    assert dense_share(point_of(dense.case)) == pytest.approx(513 / 1024)


def test_only_methods_of_one_point_are_resampled_together(tmp_path):
    entries = [
        made.entry("flash_triton", 512),
        made.entry("sdpa_flash", 512),
        made.entry("sdpa_flash", 1024),
    ]
    results = read(tmp_path, entries)
    at = {(r.case.method, point_of(r.case).Tq): r for r in results.results}
    ours, same, other = (
        at[key] for key in (("flash_triton", 512), ("sdpa_flash", 512), ("sdpa_flash", 1024))
    )
    assert speed(ours, same) == ratio(same.samples, ours.samples, paired=True)
    assert speed(ours, other) == ratio(other.samples, ours.samples, paired=False)


def names_above(drawing, i=0):
    axes = render.figure(drawing).axes[i]
    return axes, {name.get_text() for a in axes.child_axes for name in a.get_xticklabels()}


def test_the_points_of_the_speedup_figure_lie_at_their_sparsity(results, drawn):
    drawing = drawn["attention_forward_vs_sparsity"]
    *methods, bound = drawing.panels[0].lines
    assert [one.label for one in methods] == ["flex", "block_sparse"]
    assert all(p.x == p.y for p in bound.points)
    every = [r for r in attention(results, "forward") if point_of(r.case).Tq == 4096]
    for one in methods:
        found = [r for r in every if r.case.method == one.label and point_of(r.case).pattern]
        found = [r for r in found if not decoders(r)]
        wanted = sorted((ideal(r), speed(r, best_dense(r, every)).value) for r in found)
        assert sorted(p[:2] for p in one.points) == wanted
    assert names_above(drawing)[1] == {n for n in made.PATTERNS if not n.startswith("causal")}


def test_patterns_that_differ_in_their_last_number_make_a_line_with_one_name(drawn):
    drawing = drawn["attention_forward_vs_sparsity"]
    assert drawing.panels[1].title == "T = 16384, D = 128, 16 heads in all"
    axes, names = names_above(drawing, 1)
    block = next(one for one in drawing.panels[1].lines if one.label == "block_sparse")
    colour = block.look["color"]
    (line,) = [x for x in axes.lines if x.get_color() == colour and x.get_linestyle() == "-"]
    found, every = line.get_xydata().tolist(), [list(p[:2]) for p in block.points]
    tiles = sorted(1 / (1 - (1 - share) ** 2) for share in made.SHARES)
    assert [x for x, _ in found if any(x == pytest.approx(t) for t in tiles)] == pytest.approx(
        tiles
    )
    assert len(found) == len(made.SHARES) + 1  # with the share of all lengths
    assert found == sorted(found)
    assert all(point in every for point in found)
    assert [name for name in names if "random" in name] == ["random_blocks(64,…)"]
    assert "band(256)" in names


def test_two_of_a_pattern_make_no_line(tmp_path):
    entries = [made.entry("sdpa_cudnn", 512)]
    for window in (8, 64):
        more = {"pattern": f"band({window})", "hidden": (0.5 + window / 1000, 0.5 + window / 1000)}
        entries.append(made.entry("block_sparse", 512, **more))
    (drawing,) = FIGURES["attention_forward_vs_sparsity"](read(tmp_path, entries))
    axes, names = names_above(drawing)
    assert names == {"band(8)", "band(64)"}
    colour = drawing.panels[0].lines[0].look["color"]
    assert not [x for x in axes.lines if x.get_color() == colour and x.get_linestyle() == "-"]


def test_names_are_pushed_apart_and_stay_in_the_panel():
    found = _pushed([0.1, 0.9, 0.95, 0.99], 0.1)
    assert found == pytest.approx([0.1, 0.8, 0.9, 1.0])
    assert _pushed([0.2, 0.2], 0.1) == pytest.approx([0.2, 0.3])


def test_times_are_per_head_where_batches_differ(tmp_path):
    def panels(batches):
        entries = [made.entry("flex", T, batch=b) for T, b in batches]
        found = attention(read(tmp_path, entries))
        return _comparable([("D = 128", found)])

    (words, found), per_head = panels([(512, 8), (1024, 4), (2048, 2)])[0][0], True
    assert panels([(512, 8), (1024, 4), (2048, 2)])[1] is per_head
    assert (words, len(found)) == ("D = 128", 3)
    fixed, per_head = panels([(512, 2), (1024, 2), (2048, 2)])
    assert (fixed[0][0], per_head) == ("D = 128, 2 × 16 heads", False)


def test_methods_of_attention_have_colours_and_markers_of_their_own():
    styles = [NAMING.methods[method] for method in METHODS]
    assert len(set(styles)) == len({c for c, _ in styles}) == len({m for _, m in styles})


def test_linear_figures_tables_and_verdicts_do_not_see_attention(file, linear_file):
    family, own = held(load_all([linear_file, file]))["linear"]
    alone = load(linear_file)
    for name in ("forward_vs_N", "errors_vs_N"):
        draw = family.figures[name]
        assert draw(own) == draw(alone)
    assert own.of("forward") == alone.of("forward")
    for shown in (family.readme, family.full, family.tables):
        assert shown(own) == shown(alone)


@pytest.mark.slow
def test_a_report_of_attention_alone_has_its_section_and_no_verdict(tmp_path, file, results):
    assert report.main([file, "-o", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<h2 id="attention">Attention' in page
    for absent in ('class="name">H1', "block_shock", 'id="tables-linear"', "not drawn"):
        assert absent not in page
    for name in FIGURES:
        assert page.count(f'id="plot-{name}"') == 1
    for result in results.results:
        assert f">{result.id}<" in page
    assert "ratios of speed" in page
    count = 2 * len(made.PATTERNS) + len(made.SHARES)
    assert f"patterns and their tables ({count} patterns)" in page
    for target in re.findall(r'<a href="#([^"]+)"', page):
        assert f'id="{target}"' in page


@pytest.mark.slow
def test_plot_verdict_and_compare_take_a_file_of_attention_alone(tmp_path, file, capsys):
    assert plot.main([file, "-o", str(tmp_path / "plots")]) == 0
    assert {p.stem for p in (tmp_path / "plots").glob("*.svg")} == set(FIGURES)
    for name in FIGURES:
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 15_000
    assert "not drawn" not in capsys.readouterr().out
    assert verdict.main([file, "--out", str(tmp_path)]) == 0
    assert verdict.NOTHING in capsys.readouterr().out
    assert json.loads((tmp_path / "verdict.json").read_text())["hypotheses"] == []
    assert compare.main([file, file, "--fail-slower", "5%"]) == 0
    assert "0 slower, 0 faster, 0 unsure" in capsys.readouterr().out


def test_the_full_tables_show_throughput_and_ratios_of_speed(results):
    tables = full(results)
    assert len(tables) == 8
    assert tables[0].setting == "bf16"
    rows, ratios, patterns, speeds = (table_of(written.table) for written in tables[:4])
    points = {p: m for p, m in by_point(attention(results, "forward")).items() if not p.pattern}
    assert len(ratios) == len(rows) <= len(points)
    assert f"{len(rows)} of {len(points)} points" in tables[0].words

    def large(rows):
        wanted = ("large", "128", "causal")
        return next(r for r in rows if (r["tier"], r["D"], r["mask"]) == wanted)

    at = next(m for p, m in points.items() if (p.tier, p.D, p.causal) == ("large", 128, True))
    assert large(rows)["sdpa_cudnn"] == f"{at['sdpa_cudnn'].rates['tflops']:.0f}"
    ratio = str(speed(at["flash_triton"], at["sdpa_flash"]))
    assert large(ratios)["flash_triton / sdpa_flash"] == ratio
    assert "block_sparse" not in rows[0]
    assert len(patterns) == len(speeds) == 2 * len(made.PATTERNS) + len(made.SHARES)
    longer = [row["pattern"] for row in patterns if row["T"] == "16384"]
    assert longer == sorted(longer)  # of whatever tier
    assert patterns[0]["pattern"] == speeds[0]["pattern"] == "band(256)"
    assert patterns[0]["dense"].endswith("(sdpa_cudnn)")
    share = float(speeds[0]["block_sparse / dense"].split()[0]) / float(speeds[0]["ideal"])
    assert float(speeds[0]["of ideal"].strip("%")) == pytest.approx(100 * share, abs=0.2)


def test_a_wrong_guest_becomes_no_markup(tmp_path):
    entries = [made.entry(m, 64, tier="<b>x", pattern="<i>y") for m in ("flex", "<script>")]
    path = made.read_write(tmp_path / "a.json", entries)
    report.main([path, "-o", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<b>x|<i>y|<script>-", page)


def test_an_incomplete_case_is_left_out_and_breaks_nothing(tmp_path):
    entries = [made.entry("flex", 64), made.entry("flash_triton", 64)]
    del entries[1]["extra_info"]["case"]["heads"]
    results = read(tmp_path, entries)
    assert [r.case.method for r in attention(results)] == ["flex"]
    drawings, absent = draw_all(results, FAMILIES["attention"])
    assert {d.name for d in drawings} | set(absent) == set(FIGURES)
