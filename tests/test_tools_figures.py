"""Figures: variants can be told apart, ticks can be read, what is drawn is what was measured."""

import colorsys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tests import synthetic_results as synthetic
from tools.cases import over
from tools.drawing import style, ticks
from tools.families.figures import FIGURES, draw_all
from tools.families.linear import looks, steps
from tools.results import load

LABELS = len(synthetic.VARIANTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    options = {"optimizers": ("sgd",), "policies": ("plain", "packed_master")}
    entries = synthetic.everything((4096, 8192), (64, 1024), variants=synthetic.VARIANTS, **options)
    return load(synthetic.write(tmp_path_factory.mktemp("results") / "a.json", entries))


@pytest.fixture(scope="module")
def drawn(results):
    drawings, absent = draw_all(results)
    assert not absent
    return {drawing.name: drawing for drawing in drawings}


def lines_of(drawing):
    """(axes, line, label) of all lines with a marker."""
    for axes in drawing.figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            line = handle.lines[0] if hasattr(handle, "lines") else handle
            if hasattr(line, "get_marker") and line.get_marker() not in (None, "None"):
                yield axes, line, label


def look_of(line):
    return (line.get_color(), line.get_marker(), line.get_markerfacecolor(), line._dash_pattern)


def test_each_label_looks_the_same_everywhere_and_like_no_other(drawn):
    looks_of: dict[str, set] = {}
    for name, drawing in drawn.items():
        if not name.startswith(("step_breakdown", "speedup_map")):
            for _, line, label in lines_of(drawing):
                looks_of.setdefault(label, set()).add(str(look_of(line)))
    assert len(looks_of) > LABELS
    assert all(len(found) == 1 for found in looks_of.values())
    for drawing in (drawn["forward_vs_N"], drawn["training_vs_N"]):
        axes = drawing.figure.axes[0]
        panel = {label: str(look_of(line)) for a, line, label in lines_of(drawing) if a is axes}
        assert len(set(panel.values())) == len(panel) >= 10


def test_variants_of_a_method_stay_in_its_family_of_colours(results):
    for line in style.lines(results.of("forward")):
        colour = looks.line_style(line[0])["color"]
        base = looks.METHOD_STYLES[line[0].case.method][0]
        hues = [colorsys.rgb_to_hls(*to_rgb(one))[0] for one in (colour, base)]
        assert abs(hues[0] - hues[1]) < 0.02
        assert (colour == base) == (not line[0].unusual)


def test_an_unusual_kernel_has_its_marker_and_an_unusual_reduce_a_hollow_one(results):
    found = {r.label: looks.line_style(r) for r in results.of("forward")}
    base = found["block_shock"]
    assert found["block_shock · cusparselt"]["marker"] != base["marker"]
    hollow = found["block_shock · collective"]
    assert hollow["marker"] == base["marker"]
    assert hollow["markerfacecolor"] == looks.PAPER
    assert "markerfacecolor" not in base


def test_the_relative_panel_shows_the_intervals_of_the_tables(results, drawn):
    figure = drawn["forward_vs_N"].figure
    axes = next(a for a in figure.axes if a.get_ylabel().startswith("speed against"))
    at = {(r.label, r.case.N): r for r in results.of("forward") if r.case.B == 64}
    bars = {bar.get_label(): bar for bar in axes.containers}
    assert len(bars) == LABELS
    for label, bar in bars.items():
        (segments,) = (lines.get_segments() for lines in bar.lines[2])
        for n, segment in zip((4096, 8192), segments, strict=True):
            time = over(at[label, n], at["dense_tp_row", n])
            assert segment[0][1] == pytest.approx(1 / time.high)
            assert segment[1][1] == pytest.approx(1 / time.low)


def test_the_legend_of_twelve_lines_covers_no_panel(drawn):
    for name in ("forward_vs_N", "training_vs_N", "forward_over_floor"):
        figure = drawn[name].figure
        (legend,) = figure.legends
        assert len(legend.get_texts()) >= 9
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        for axes in figure.axes:
            assert axes.get_tightbbox().y0 >= box.y1


def test_lines_left_out_are_told_and_do_not_change_the_file_name(tmp_path):
    masks = ["1010", "1001", "random", "magnitude"]
    variants = synthetic.VARIANTS + tuple(("block_shock", {"mask": mask}) for mask in masks)
    entries = synthetic.everything((256, 512), (16,), variants=variants)
    entries += synthetic.everything((256, 512), (16,), variants=variants, dtypes=("fp16",))[:-2]
    loaded = load(synthetic.write(tmp_path / "a.json", entries))
    drawings = FIGURES["forward_vs_N"](loaded)
    assert [drawing.name for drawing in drawings] == ["forward_vs_N", "forward_vs_N_fp16"]
    for drawing in drawings:
        labels = {label for _, _, label in lines_of(drawing)}
        texts = " ".join(text.get_text() for text in drawing.figure.texts)
        assert f"{len(labels)} of {len(variants)} lines, the others are in the tables" in texts
        assert "block_shock · cusparselt" in labels
        assert "block_shock · random" not in labels


@pytest.mark.parametrize("phase", ["forward", "training"])
def test_time_over_floor_is_the_median_over_the_floor_of_the_same_case(results, drawn, phase):
    figure = drawn[f"{phase}_over_floor"].figure
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["B = 64", "B = 1024", "N = 8192"]
    axes = figure.axes[1]
    found = {
        (r.label, r.case.N): r.median / r.floor["seconds"]
        for r in results.of(phase)
        if r.case.B == 1024
    }
    drawn_ = {
        (label, int(n)): y
        for a, line, label in lines_of(drawn[f"{phase}_over_floor"])
        if a is axes
        for n, y in zip(*line.get_data(), strict=True)
    }
    assert drawn_ == pytest.approx(found)
    ticks_ = [float(tick) for tick in figure.axes[0].get_yticks()]
    assert ticks_[0] == 1
    assert {1, 2} <= set(ticks_)
    assert figure.axes[0].get_ylim()[0] == pytest.approx(1, rel=0.03)


def test_a_time_below_its_floor_is_seen(tmp_path):
    entries = [synthetic.entry("dense_tp_row", n, 64, seconds=1e-6) for n in (4096, 8192)]
    (drawing,) = FIGURES["forward_over_floor"](load(synthetic.write(tmp_path / "a.json", entries)))
    (axes,) = drawing.figure.axes
    lowest = min(min(line.get_ydata()) for _, line, _ in lines_of(drawing))
    assert axes.get_ylim()[0] < lowest < 1


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


def test_regions_of_many_batches_show_both_ends_and_say_so(tmp_path):
    entries = [
        synthetic.entry(method, n, b)
        for method in ("dense_tp_row", "block_shock")
        for n in (4096, 8192)
        for b in (16, 64, 1024, 4096, 16384)
    ]
    loaded = load(synthetic.write(tmp_path / "a.json", entries))
    (drawing,) = FIGURES["forward_regions_vs_N"](loaded)
    titles = [axes.get_title() for axes in drawing.figure.axes if axes.get_title()]
    assert (len(titles), titles[0], titles[-1]) == (4, "B = 16", "B = 16384")
    assert "some between" in drawing.caption


def test_the_caption_of_memory_speaks_only_of_what_is_drawn(tmp_path, drawn):
    entries = synthetic.everything((256, 512), (16,))
    for entry in entries:
        memory = entry["extra_info"]["memory"]
        memory["peak_bytes"] = None
        if entry["extra_info"]["case"]["method"] != "dense_single":
            del memory["weight_bytes_estimated"]
    cpu = load(synthetic.write(tmp_path / "cpu.json", entries, kind="cpu"))
    (drawing,) = FIGURES["memory_vs_N"](cpu)
    assert "peak" not in drawing.title
    assert "Peak" not in drawing.caption
    assert "MiB" in drawing.caption
    assert "Ring" in drawing.caption
    rings = [line for line in drawing.figure.axes[0].lines if line.get_markersize() == 13]
    assert len(rings) == 1
    assert "Peak" in drawn["memory_vs_N"].caption
    assert "GiB" in drawn["memory_vs_N"].caption
