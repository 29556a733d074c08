"""What README and docs/ promise about themselves: links lead somewhere, and README stays short."""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "results/README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "tools").glob("*.md"),
    )
    if page.exists()
)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINES, BYTES, TABLE = 220, 16_000, 8  # of README; rows and columns of its table of results


def prose(page):
    return FENCE.sub("", page.read_text())


def links(page):
    """The relative links of a page: (file, anchor), each "" where there is none."""
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match(r"[a-z]+:", target):
            yield target.partition("#")[::2]


def anchors(page):
    """Of the headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?)\s*#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN")
        slug = "".join(kept).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        yield f"{slug}-{count}" if count else slug


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{file}: no such file"
        assert target.is_relative_to(ROOT), f"{file} leads out of the checkout"
        if anchor:
            assert anchor in set(anchors(target)), f"{file}#{anchor}: no such heading"


def test_the_pages_that_readme_names_are_linked_from_it():
    linked = {(ROOT / file).resolve() for file, _ in links(ROOT / "README.md") if file}
    assert set((ROOT / "docs").glob("*.md")) <= linked
    assert {ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "results"} <= linked


def test_links_are_found_and_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '# A `b`, c: d\n## Twice\n## Twice\n[x](a.md#b "t") ![y](<c.png>) [z](https://a.b)\n'
        "`[no](no.md)`\n```\n# no\n[no](no.md)\n```\n"
    )
    assert list(links(page)) == [("a.md", "b"), ("c.png", "")]
    assert list(anchors(page)) == ["a-b-c-d", "twice", "twice-1"]


def test_readme_is_short_and_has_one_plot_and_one_table_of_results():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) < BYTES
    assert len(readme.splitlines()) < LINES
    text = readme.decode()
    assert len(re.findall(r"!\[", text)) == 1
    begin, end = "<!-- linear:begin -->", "<!-- linear:end -->"
    assert (text.count(begin), text.count(end)) == (1, 1)
    table = [
        line for line in text.split(begin)[1].split(end)[0].splitlines() if line.startswith("|")
    ]
    assert 3 <= len(table) <= TABLE + 2  # with its head and the rule below it
    assert len(table[0].strip("|").split("|")) <= TABLE


@pytest.mark.parametrize(
    "word", ["`tile`", "`1100`", "folded", "row", "column", "kernel", "reduce", "master"]
)
def test_a_word_is_explained_before_it_is_used(word):
    text = (ROOT / "README.md").read_text()
    explained = text.index("## Words")
    (line,) = re.findall(rf"^\|[^|]*{re.escape(word)}[^|]*\|[^|]+\|$", text, re.MULTILINE)
    head = FENCE.sub("", text[:explained])
    assert not re.search(rf"(?<![\w`]){re.escape(word)}(?![\w`])", head), f"{word} before {line}"
