"""Plots and report: everything measured is in them, and they stand alone."""

import html
import html.parser
import json
import random
import re
from pathlib import Path

import pytest

from tests import synthetic_results as synthetic
from tools import compact, plot, report
from tools.cases import interleaved
from tools.drawing import render
from tools.families import FAMILIES
from tools.families.linear import steps
from tools.family import draw_all
from tools.files import ToolError
from tools.results import load
from tools.verdict import judged

FIGURES = FAMILIES["linear"].figures


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    training = {"optimizers": ("sgd",), "policies": ("plain", "dense_master", "packed_master")}
    # One line over N and one over B: every figure has something to draw, and few panels.
    entries = synthetic.everything((4096, 8192), (64,), **training)
    entries += synthetic.everything((4096,), (1024,), **training)
    # A wrong guest: whatever it brings must not become markup.
    entries.append(synthetic.entry("<script>alert(1)</script>$_{", 4096, 64))
    return synthetic.write(tmp_path_factory.mktemp("results") / "a.json", entries)


@pytest.fixture(scope="module")
def drawn(file):
    return draw_all(load(file), FAMILIES["linear"])


@pytest.fixture(scope="module")
def page(file):
    loaded = load(file)
    return report.page(loaded, judged(loaded))


def test_every_plot_is_written_and_none_is_empty(file, drawn, tmp_path, capsys):
    assert plot.main([file, "-o", str(tmp_path / "plots")]) == 0
    assert "not drawn" not in capsys.readouterr().out
    for name in FIGURES:
        png = (tmp_path / "plots" / f"{name}.png").read_bytes()
        svg = (tmp_path / "plots" / f"{name}.svg").read_text()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 15_000
        assert svg.rstrip().endswith("</svg>")


def test_chosen_plots_are_drawn_alone_as_png(file, tmp_path):
    folder = tmp_path / "plots"
    assert plot.main([file, "-o", str(folder), "--only", "drift,forward_vs_N"]) == 0
    assert {path.name for path in folder.iterdir()} == {"drift.png", "forward_vs_N.png"}
    with pytest.raises(ToolError, match="no plot nothing of these files; there are forward_vs_N"):
        plot.main([file, "-o", str(folder), "--only", "drift,nothing"])


def test_a_plot_without_data_is_not_drawn_and_says_why(tmp_path, capsys):
    entries = [synthetic.entry(method, 4096, 64) for method in synthetic.METHODS]
    path = synthetic.write(tmp_path / "a.json", entries)
    assert plot.main([path, "-o", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    drawn = {file.stem for file in (tmp_path / "plots").glob("*.png")}
    for name in set(FIGURES) - drawn:
        assert re.search(rf"not drawn: {name}: .+", printed)
    assert "not drawn: drift: no results of drift" in printed
    assert "two values of N" in printed


def test_titles_say_the_device_and_a_cpu_says_nothing_about_gpus(tmp_path):
    entries = synthetic.everything((256, 512), (16,))
    path = synthetic.write(tmp_path / "cpu.json", entries, kind="cpu")
    drawing = FIGURES["forward_vs_N"](load(path))[0]
    assert "CPU (2 gloo ranks) · CPU: says nothing about GPUs" in drawing.subtitle


def test_the_same_results_give_the_same_svg(file):
    first, second = (render.svg(FIGURES["forward_vs_N"](load(file))[0]) for _ in range(2))
    assert first == second


def test_a_compact_file_is_read_as_the_same_results(file, tmp_path, capsys):
    small = tmp_path / "small.json"
    small.write_text(json.dumps(json.loads(Path(file).read_text()), indent=4))
    before = load(small)
    size = small.stat().st_size
    assert compact.main([str(small)]) == 0
    after = load(small)
    assert after.machine == before.machine
    for new, old in zip(after.results, before.results, strict=True):
        assert (new.id, new.case, new.samples) == (old.id, old.case, old.samples)
        for name in ("rates", "memory", "floor"):
            assert getattr(new, name) == pytest.approx(getattr(old, name), rel=1e-5), name
        for region, part in old.regions.items():
            assert vars(new.regions[region]) == pytest.approx(vars(part), rel=1e-5)
    assert small.stat().st_size < 0.8 * size
    assert "MB, now" in capsys.readouterr().out
    content = json.loads(small.read_text())
    assert content["machine_info"] == json.loads(Path(file).read_text())["machine_info"]
    assert not any("options" in entry for entry in content["benchmarks"])
    content["benchmarks"][0]["extra_info"]["rates"]["tokens_per_s"] = 1 / 3
    rounded = json.loads(compact.compacted(json.dumps(content)))["benchmarks"][0]
    assert rounded["extra_info"]["rates"]["tokens_per_s"] == 0.333333
    again = small.read_bytes()
    assert compact.main([str(small)]) == 0
    assert small.read_bytes() == again


def test_a_file_without_its_commit_is_given_one_and_others_keep_theirs(file, tmp_path):
    content = json.loads(Path(file).read_text())
    paths = {"unversioned": tmp_path / "a.json", "a" * 40: tmp_path / "b.json"}
    for name, path in paths.items():
        path.write_text(json.dumps(content | {"commit_info": {"id": name, "dirty": False}}))
    assert [load(path).commits for path in paths.values()] == [(), ("aaaaaaa",)]
    with pytest.raises(ToolError, match="--commit 'main' is no commit: give 7 to 40 hex digits"):
        compact.main([*map(str, paths.values()), "--commit", "main"])
    assert compact.main([*map(str, paths.values()), "--commit", "b" * 40]) == 0
    commits = [load(path).commits for path in paths.values()]
    assert commits == [("bbbbbbb + changes",), ("aaaaaaa",)]


def test_what_is_no_result_file_leaves_every_file_as_it_was(file, tmp_path):
    wrong, right = tmp_path / "wrong.json", tmp_path / "right.json"
    wrong.write_text("{}")
    right.write_text(Path(file).read_text())
    with pytest.raises(ToolError, match=r"wrong\.json is JSON, but no benchmark file"):
        compact.main([str(right), str(wrong)])
    assert (wrong.read_text(), right.read_text()) == ("{}", Path(file).read_text())


def test_segments_of_a_step_add_up_to_its_total(file):
    loaded = load(file)
    ahead = {r.case.method: r for r in loaded.of("forward") if (r.case.N, r.case.B) == (4096, 64)}
    for result in loaded.of("training"):
        for forward in (None, ahead.get(result.case.method)):
            parts = steps.segments(result, forward)
            assert sum(parts.values()) == pytest.approx(result.regions["total"].avg)
            assert all(seconds >= -1e-12 for seconds in parts.values())


def test_only_neighbours_of_one_run_count_as_interleaved(file):
    found = {r.label: r for r in load(file).of("training") if (r.case.N, r.case.B) == (4096, 64)}
    assert interleaved([found["block_shock · packed_master"], found["dense_tp_row"]])
    assert not interleaved([found["block_shock · packed_master"], load(file).results[-1]])


class Page(html.parser.HTMLParser):
    """Collects tags, links and ids, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "tr"):  # which end where the next begins
            self._end_cells("td" if tag == "td" else "tr")
        attributes = dict(attrs)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action", "data")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag == "tbody":
            self._end_cells("tr")
        assert self.open.pop() == tag

    def _end_cells(self, most):
        while self.open[-1] == "td" or (most == "tr" and self.open[-1] == "tr"):
            self.open.pop()


def test_the_report_needs_nothing_outside_itself(page):
    assert "https:" not in page
    assert re.findall(r"http:[^\"]*", page) == ["http://www.w3.org/2000/svg"]  # a name, never asked
    parsed = Page()
    parsed.feed(page)
    assert not parsed.open
    assert not {"link", "iframe", "img"} & set(parsed.tags)
    assert all(link.startswith("#") for link in parsed.links)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert not re.search(r"@import|url\((?!#)|<script src", page)


def test_the_report_holds_every_case_and_every_plot_in_order(file, drawn, page):
    for result in load(file).results:
        if "<" not in result.id:
            assert f">{result.id}<" in page
    for drawing in drawn[0]:
        assert f'id="plot-{drawing.name}"' in page
    places = ["verdict", "plot-forward_vs_N", "tables-linear", "plot-forward_vs_B", "checks"]
    places += ["plot-quality_adjusted_speed_vs_N", "plot-drift", "environment"]
    found = [page.index(f'id="{place}"') for place in places]
    assert found == sorted(found)
    assert "NV18" in page


def test_each_chart_has_a_legend_of_its_lines_and_its_values(page):
    charts = re.findall(r'<figure class="plot" id="plot-(.*?)">(.*?)</figure>', page, re.DOTALL)
    assert len(charts) == len(FIGURES)
    for _, chart in charts:
        pressed = re.findall(r'class="key" aria-pressed="(true|false)"', chart)
        (data,) = re.findall(r'<script type="application/json">(.*?)</script>', chart)
        assert len(json.loads(data)["lines"]) == len(pressed)
        (key,) = re.findall(r'<svg tabindex="0" [^>]* id="([^"]*)"', chart)
        for i, state in enumerate(pressed):
            parts = re.findall(rf'<g( class="off")? id="{re.escape(key)}-l{i}-', chart)
            assert parts
            assert {bool(off) for off in parts} == {state == "false"}


def some(**options):
    """A forward of two methods at two sizes."""
    methods = ("dense_tp_row", "block_shock")
    return [synthetic.entry(m, n, 16, **options) for m in methods for n in (256, 512)]


def test_a_setting_with_fewer_results_is_named_and_not_drawn(tmp_path):
    entries = some() + some(dtype="fp16")[:-1] + [synthetic.entry("dense_single", 256, 16)]
    entries.append(synthetic.entry("block_shock", 512, 16, dtype="fp16"))
    text = report.page(load(synthetic.write(tmp_path / "a.json", entries)), [])
    assert "<code>forward_vs_N_fp16</code>" in text
    assert 'id="plot-forward_vs_N_fp16"' not in text
    assert 'id="plot-forward_vs_N"' in text


def test_an_unknown_family_is_told_and_the_rest_is_shown(tmp_path, capsys):
    entries = some()
    entries += [synthetic.entry("some_method", n, 16, family="made_up") for n in (256, 512)]
    path = synthetic.write(tmp_path / "a.json", entries)
    told = "a.json has 2 cases of the family made_up, which these tools do not know"
    text = report.page(load(path), [])
    assert told in text
    assert 'id="plot-forward_vs_N"' in text
    assert 'id="tables-made_up"' in text
    assert plot.main([path, "-o", str(tmp_path), "--only", "forward_vs_N"]) == 0
    assert told in capsys.readouterr().out


def test_what_a_file_says_never_becomes_markup(page):
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_report_warns_on_a_cpu_and_follows_the_theme(tmp_path, page):
    path = synthetic.write(
        tmp_path / "cpu.json", [synthetic.entry("dense_single", 64, 1)], kind="cpu"
    )
    assert report.main([path, "-o", str(tmp_path / "folder")]) == 0
    text = (tmp_path / "folder" / "report.html").read_text()
    assert "CPU: says nothing about GPUs" in text
    assert "CPU: says nothing about GPUs" not in page
    assert "prefers-color-scheme: dark" in page
    assert "var(--ink)" in page


def test_each_mask_and_opponent_has_its_own_badge(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_all", lambda *_: ([], {}))  # plots are tested above
    entries = synthetic.everything((4096, 8192), (64, 1024), variants=synthetic.VARIANTS)
    loaded = load(synthetic.write(tmp_path / "a.json", entries))
    verdicts = judged(loaded)
    page = report.page(loaded, verdicts)
    cards = re.findall(r'<section class="card">(.*?)</section>', page, re.DOTALL)
    assert len(cards) == len(verdicts) == 3
    for card, verdict in zip(cards, verdicts, strict=True):
        assert verdict.claim in html.unescape(card)
        assert verdict.sentence in html.unescape(card)
        badges = re.findall(r'<span class="status (\w+)">(\w+)</span> *<b>(.*?)</b>', card)
        assert badges == [(one.status, one.status, one.title) for one in verdict.deciding]
        (evidence,) = re.findall(
            rf"<details class=\"box\"><summary>Evidence for {verdict.name}.*?</details>",
            page,
            re.DOTALL,
        )
        assert evidence.count("<h3>") == len(verdict.judgements)
        assert evidence.count("<h3>Beside: ") == len(verdict.beside) > 0
        rows = evidence.count("<tr>") - evidence.count("<thead>")
        assert rows == sum(len(one.points) for one in verdict.judgements)


def test_results_of_any_shape_are_drawn_or_named(tmp_path):
    """Random subsets of a sweep: every figure is drawn or has its reason, never an exception."""
    entries, chance = synthetic.everything((256, 512, 1024), (16, 64)), random.Random(0)
    for i in range(4):
        chosen = chance.sample(entries, chance.choice([1, 3, 20]))
        for entry in chosen[::3]:
            for key in ("regions", "errors", "memory", "floor", "drift"):
                entry["extra_info"].pop(key, None)
        loaded = load(synthetic.write(tmp_path / f"{i}.json", chosen))
        drawings, absent = draw_all(loaded, FAMILIES["linear"])
        assert {d.name.partition("_bf16")[0] for d in drawings} | set(absent) == set(FIGURES)
        assert all(reason for reason in absent.values())
