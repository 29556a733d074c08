"""Figures: variants can be told apart, ticks can be read, what is drawn is what was measured."""

import colorsys
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tests import synthetic_results as synthetic
from tools.cases import over
from tools.drawing import looks, page, render, style, ticks
from tools.drawing.chart import SAME, Axis, Line, Panel, Point, merged
from tools.families import FAMILIES
from tools.families.linear import steps
from tools.family import draw_all
from tools.results import load

FIGURES = FAMILIES["linear"].figures
LABELS = len(synthetic.VARIANTS)
Y = Axis("time", str)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    options = {"optimizers": ("sgd",), "policies": ("plain", "packed_master")}
    entries = synthetic.everything((4096, 8192), (64, 1024), variants=synthetic.VARIANTS, **options)
    return load(synthetic.write(tmp_path_factory.mktemp("results") / "a.json", entries))


@pytest.fixture(scope="module")
def drawn(results):
    drawings, absent = draw_all(results, FAMILIES["linear"])
    assert not absent
    return {drawing.name: drawing for drawing in drawings}


def only(name, tmp_path, entries, **options):
    (drawing,) = FIGURES[name](load(synthetic.write(tmp_path / "a.json", entries, **options)))
    return drawing


def line(label, values, **options):
    return Line(label, tuple(Point(x, y) for x, y in enumerate(values)), **options)


def test_each_method_looks_the_same_everywhere_and_like_no_other(drawn):
    looks_of: dict[str, set] = {}
    for drawing in drawn.values():
        if drawing.name != "step_breakdown":
            for panel in drawing.panels:
                for one in panel.lines:
                    label = one.label.split(" ≈ ")[0]
                    if not one.bound and label.split(" · ")[0] in synthetic.METHODS:
                        look = {k: v for k, v in one.look.items() if k != "markevery"}
                        looks_of.setdefault(label, set()).add(str(look))
    looks_of = {label: found for label, found in looks_of.items() if "layout fix" not in label}
    assert len(looks_of) >= LABELS
    assert all(len(found) == 1 for found in looks_of.values())
    for name in ("forward_vs_N", "training_vs_N"):
        here = [one for one in drawn[name].panels[0].lines if not one.bound]
        assert len({str(one.look) for one in here}) == len(here) >= 5


def test_variants_of_a_method_stay_in_its_family_of_colours(results):
    for found in style.lines(results.of("forward")):
        colour = looks.line_style(found[0])["color"]
        base = found[0].naming.methods[found[0].case.method][0]
        hues = [colorsys.rgb_to_hls(*to_rgb(one))[0] for one in (colour, base)]
        assert abs(hues[0] - hues[1]) < 0.02
        assert (colour == base) == (not found[0].unusual)


def test_an_unusual_kernel_has_its_marker_and_an_unusual_reduce_a_hollow_one(results):
    found = {r.label: looks.line_style(r) for r in results.of("forward")}
    base = found["block_shock"]
    assert found["block_shock · cusparselt"]["marker"] != base["marker"]
    hollow = found["block_shock · collective"]
    assert hollow["marker"] == base["marker"]
    assert hollow["markerfacecolor"] == style.PAPER
    assert "markerfacecolor" not in base


def test_lines_that_coincide_everywhere_are_one_that_names_both():
    far = 1 + 1.2 * SAME
    near = 1 + 0.8 * SAME
    first = Panel(
        "a", (line("one", [1, 2]), line("two", [near, 2]), line("far", [1, 2 * far])), "N", Y
    )
    second = Panel("b", (line("one", [3]), line("two", [3]), line("far", [3])), "N", Y)
    a, b = merged([first, second])
    assert [one.label for one in a.lines] == ["one ≈ two", "far"]
    assert [one.label for one in b.lines] == ["one ≈ two", "far"]
    apart = Panel("b", (line("one", [3]), line("two", [3 * far])), "N", Y)
    assert [one.label for one in merged([first, apart])[0].lines] == ["one", "two", "far"]


def test_the_longer_of_coinciding_lines_is_drawn_and_shown_where_any_of_them_was():
    short, long = line("short", [1, 2]), line("long", [1, 2, 3], main=False)
    (panel,) = merged([Panel("a", (short, long), "N", Y)])
    (one,) = panel.lines
    assert (one.label, len(one.points), one.main) == ("short ≈ long", 3, True)


def test_the_main_plot_shows_the_ratios_of_the_tables_with_their_intervals(results, drawn):
    drawing = drawn["forward_vs_N"]
    at = {(r.label, r.case.N, r.case.B): r for r in results.of("forward")}
    seen = set()
    for panel in drawing.panels:
        b = int(panel.title.removeprefix("B = "))
        for one in panel.lines:
            if not one.bound:
                for p in one.points:
                    label = one.label.split(" ≈ ")[0]
                    ratio = over(at[label, p.x, b], at["dense_tp_row", p.x, b])
                    assert (p.y, p.low, p.high) == (ratio.value, ratio.low, ratio.high)
                    seen.add(label)
    assert "dense_tp_row" not in seen
    assert len(seen) == LABELS - 1
    assert "below 1" in drawing.panels[0].y.label


def test_the_main_plot_begins_with_five_lines_at_most(drawn):
    drawing = drawn["forward_vs_N"]
    main = [one for one in drawing.only_main().panels[0].lines if not one.bound]
    assert [one.label.split(" ≈ ")[0] for one in main] == [
        "dense_single",
        "dense_tp_row · auto reduce",
        "dense_tp_column",
        "block_shock",
        "block_shock · 1100",
    ]
    assert len(drawing.labels) > 6


def test_without_one_gpu_alone_the_masked_split_is_drawn(tmp_path):
    methods = ("dense_tp_row", "masked_split", "block_shock", "a_new_one")
    entries = [
        synthetic.entry(m, n, 64) for m in methods if m in synthetic.METHODS for n in (64, 128)
    ]
    entries += [synthetic.entry("a_new_one", n, 64, seconds=1.0) for n in (64, 128)]
    drawing = only("forward_vs_N", tmp_path, entries)
    main = {one.label for one in drawing.panels[0].lines if one.main and not one.bound}
    assert main == {"masked_split", "block_shock", "a_new_one"}


@pytest.mark.parametrize("name", list(FIGURES))
def test_nothing_is_cut_and_the_legend_covers_no_panel(drawn, name):
    figure = render.figure(drawn[name].only_main())
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for axes in figure.axes:
        assert axes.get_tightbbox().y0 >= box.y1 - 1
        assert axes.get_window_extent().height > 0.9 * figure.dpi
        shown = [t.get_window_extent() for t in axes.get_yticklabels() if t.get_text()]
        bottoms = sorted((one.y0, one.y1) for one in shown)
        assert all(a[1] <= b[0] + 3 for a, b in itertools.pairwise(bottoms))


def test_lines_left_out_are_told_and_do_not_change_the_file_name(tmp_path):
    masks = ["1010", "1001", "random", "magnitude"]
    variants = synthetic.VARIANTS + tuple(("block_shock", {"mask": mask}) for mask in masks)
    entries = synthetic.everything((256, 512), (16,), variants=variants)
    entries += synthetic.everything((256, 512), (16,), variants=variants, dtypes=("fp16",))[:-2]
    drawings = FIGURES["forward_vs_N"](load(synthetic.write(tmp_path / "a.json", entries)))
    assert [d.name for d in drawings] == ["forward_vs_N", "forward_vs_N_fp16"]
    assert [d.setting for d in drawings] == [False, True]
    for drawing in drawings:
        labels = " ≈ ".join(drawing.labels)
        assert drawing.subtitle.endswith("; the other lines are in the tables")
        assert len(labels.split(" ≈ ")) <= style.MOST_LINES < len(variants)
        assert "block_shock · cusparselt" in labels
        assert "block_shock · random" not in labels


@pytest.mark.parametrize("phase", ["forward", "training"])
def test_time_over_floor_is_the_median_over_the_floor_of_the_same_case(results, drawn, phase):
    drawing = drawn[f"{phase}_over_floor"]
    assert [panel.title for panel in drawing.panels] == ["B = 64", "B = 1024", "N = 8192"]
    found = {(r.label, r.case.N): r for r in results.of(phase) if r.case.B == 1024}
    for one in drawing.panels[1].lines:
        for p in one.points:
            r = found[one.label.split(" ≈ ")[0], p.x]
            assert p.y == r.median / r.floor["seconds"]
    assert any(one.label.startswith("dense_tp_row") for one in drawing.panels[1].lines)


def test_a_time_below_its_floor_is_seen(tmp_path):
    entries = [synthetic.entry("dense_tp_row", n, 64, seconds=1e-6) for n in (4096, 8192)]
    drawing = only("forward_over_floor", tmp_path, entries)
    (axes,) = render.figure(drawing).axes
    lowest = min(p.y for one in drawing.panels[0].lines for p in one.points)
    assert axes.get_ylim()[0] < lowest < 1


def test_every_point_of_a_page_lies_where_it_is_drawn(drawn):
    drawing = drawn["forward_vs_N"]
    chart = page.chart(drawing, "k")
    lines = json.loads(chart["points"])["lines"]
    assert len(lines) == len(chart["entries"]) == len(drawing.labels)
    parts = r'<g(?: class="off")? id="k-l(\d+)-p(\d+)">(.*?)</g>'
    found = {(int(i), int(panel)): inner for i, panel, inner in re.findall(parts, chart["svg"])}
    for panel, one in ((i, one) for i, p in enumerate(drawing.panels) for one in p.lines):
        i = drawing.labels.index(one.label)
        marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', found[i, panel])
        places = [point[:2] for point in lines[i] if point[2] == panel]
        if one.main and not one.bound:
            assert [(float(x), float(y)) for x, y in marks] == [
                pytest.approx(place, abs=0.11) for place in places
            ]
            assert len(marks) == len(one.points)


def test_every_bar_of_a_page_has_its_value(drawn):
    drawing = drawn["step_breakdown"]
    lines = json.loads(page.chart(drawing, "k")["points"])["lines"]
    for label, points in zip(drawing.labels, lines, strict=True):
        here = [one for panel in drawing.panels for one in panel.lines if one.label == label]
        assert len(points) == sum(len(one.points) for one in here)


def test_a_line_that_is_off_at_first_does_not_squeeze_the_others(tmp_path):
    slow = {"masked_split": 50.0, "block_shock_folded": 1.2}
    entries = [
        synthetic.entry(m, n, 64, seconds=1e-3 * slow.get(m, 1.0))
        for m in synthetic.METHODS
        for n in (64, 128)
    ]
    chart = page.chart(only("forward_vs_N", tmp_path, entries), "k")
    ticks_ = [float(text) for text in re.findall(r">([\d.]+)</text>", chart["svg"])]
    assert 20 not in ticks_
    lines = json.loads(chart["points"])["lines"]
    points = {entry["label"]: points for entry, points in zip(chart["entries"], lines, strict=True)}
    assert points["masked_split"] == []  # what lies outside of the panel cannot be pointed at
    assert len(points["block_shock_folded"]) == 2


def test_the_values_of_a_point_are_words_with_their_interval(drawn):
    data = json.loads(page.chart(drawn["forward_vs_N"], "k")["points"])
    assert data["panels"] == ["B = 64", "B = 1024"]
    _, _, panel, where, value = data["lines"][0][0]
    assert (panel, where) == (0, "N 4096")
    assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] \([\d.]+ .s\)", value)


def test_the_svg_of_a_page_is_small_and_keeps_no_digit_that_nobody_sees(drawn):
    drawing = drawn["forward_vs_N"]
    svg = page.chart(drawing, "k")["svg"]
    assert len(svg) < 0.6 * len(render.bare_svg(drawing)[0])
    for attribute in re.findall(r' (?:d|x|y)="([^"]*)"', svg):
        assert not re.search(r"\.\d\d", attribute)
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name == "k" or name.startswith("k-") for name in ids)
    assert {name[1:] for name in re.findall(r'(?:href="|url\()(#[^")]*)', svg)} <= set(ids)
    for text in ("4096", "B = 1024", "N (weight N×N)"):
        assert f">{text}</text>" in svg
    assert style.INK not in svg


@given(st.floats(0.01, 1), st.floats(1, 100))
def test_a_ratio_axis_has_one_and_a_tick_above_it_and_no_crowd(low, high):
    axes = Figure().subplots()
    axes.plot([low, high])
    ticks.ratio_axis(axes)
    bottom, top = axes.get_ylim()
    found = [float(tick) for tick in axes.get_yticks()]
    assert 1 in found
    assert max(found) > 1
    assert bottom <= min(found) <= max(found) <= top
    assert bottom <= low <= high <= top
    assert len(found) <= 1 + 1 / ticks.CROWDED


@given(st.floats(1e-6, 1), st.floats(1.05, 1e4))
def test_a_log_axis_has_two_ticks_however_narrow_it_is(low, wide):
    axes = Figure().subplots()
    axes.plot([low, low * wide])
    axes.set_yscale("log")
    axes.set_ylim(low, low * wide)
    ticks.log_axis(axes)
    found = [tick for tick in axes.get_yticks() if low <= tick <= low * wide]
    assert len(found) >= 2


def step(forward, backward, wire):
    """A training result's regions in ms, and those of the forward phase beside it."""
    regions = {"forward": forward, "backward": backward, "allreduce": wire}
    regions["total"] = forward + backward
    return {
        name: {"avg": 1e-3 * v, "p50": 1e-3 * v, "p95": 1e-3 * v} for name, v in regions.items()
    }


@pytest.mark.parametrize(
    ("ahead", "wire"),
    [(9.0, 9.5), (0.5, 0.6), (2.0, 1.0), (2.0, 2.0), (2.0, 1.999)],
)
def test_no_pass_is_drawn_as_nothing_because_another_run_waited_longer(tmp_path, ahead, wire):
    """On a CPU the forward alone may wait longer for its peer than the whole forward of a step."""
    lone = {"forward": ahead, "allreduce": wire}
    part = {k: {"avg": 1e-3 * v, "p50": 1e-3 * v, "p95": 1e-3 * v} for k, v in lone.items()}
    entries = [
        synthetic.entry("dense_tp_row", 64, 1, part={"regions": part}),
        synthetic.entry(
            "dense_tp_row",
            64,
            1,
            phase="training",
            policy="plain",
            optimizer="sgd",
            part={"regions": step(1.0, 2.0, 2.5)},
        ),
    ]
    loaded = load(synthetic.write(tmp_path / "a.json", entries))
    (training,), (forward,) = loaded.of("training"), loaded.of("forward")
    parts = steps.segments(training, forward)
    assert parts["forward"] > 0
    assert parts["backward"] > 0
    assert sum(parts.values()) == pytest.approx(3e-3)
    assert parts["communication"] == pytest.approx(2.5e-3)


def test_the_forward_gives_up_the_share_that_its_own_phase_had(tmp_path):
    part = {"regions": step(2.0, 0.0, 0.5)}
    options = {"phase": "training", "policy": "plain", "optimizer": "sgd"}
    entries = [
        synthetic.entry("dense_tp_row", 64, 1, part=part),
        synthetic.entry("dense_tp_row", 64, 1, part={"regions": step(1.0, 2.0, 1.0)}, **options),
    ]
    loaded = load(synthetic.write(tmp_path / "a.json", entries))
    parts = steps.segments(loaded.of("training")[0], loaded.of("forward")[0])
    assert parts["forward"] == pytest.approx(0.75e-3)
    assert parts["backward"] == pytest.approx(1.25e-3)


def test_regions_of_many_batches_show_both_ends_and_the_average(tmp_path):
    entries = [
        synthetic.entry(method, n, b)
        for method in ("dense_tp_row", "block_shock")
        for n in (4096, 8192)
        for b in (16, 64, 1024, 4096, 16384)
    ]
    drawing = only("forward_regions_vs_N", tmp_path, entries)
    titles = [panel.title for panel in drawing.panels]
    assert titles[:2] == ["forward, B = 16", "forward, B = 16384"]
    point = drawing.panels[0].lines[0].points[0]
    assert point.low == point.y <= point.high
    assert point.note.startswith("average ")


def test_the_caption_of_memory_speaks_only_of_what_is_drawn(tmp_path, drawn):
    entries = synthetic.everything((256, 512), (16,))
    for entry in entries:
        memory = entry["extra_info"]["memory"]
        memory["peak_bytes"] = None
        if entry["extra_info"]["case"]["method"] != "dense_single":
            del memory["weight_bytes_estimated"]
    drawing = only("memory_vs_N", tmp_path, entries, kind="cpu")
    assert "peak" not in drawing.title
    assert "Peak:" not in drawing.caption
    assert "Ring" in drawing.caption
    (panel,) = drawing.panels
    (rings,) = [one for one in panel.lines if one.look["linestyle"] == "none"]
    assert len(rings.points) == 2
    assert "Peak:" in drawn["memory_vs_N"].caption


def test_a_cpu_has_host_time_and_no_device_time(tmp_path):
    entries = synthetic.everything((256, 512), (16,))
    loaded = load(synthetic.write(tmp_path / "cpu.json", entries, kind="cpu"))
    captions = [d.caption for d in draw_all(loaded, FAMILIES["linear"])[0]]
    assert any("host time" in caption for caption in captions)
    assert not any("device time" in caption for caption in captions)
