"""The README's results tables and verdicts, from the results themselves.

    python -m tools.summary FILE... [--readme README.md] [--check]

Files of one device and number of ranks are read as one; each such group has a section of its own,
in the order given. Writes what stands between the lines <!-- results:begin --> and
<!-- results:end -->, and nothing else, so that no number there is typed by hand. Attention has
tables of its own, between <!-- attention:begin --> and <!-- attention:end -->; a place whose
results are not given stays as it is. Without --readme the tables are printed. --check writes
nothing and exits with 1 where the README is not what these results give.
"""

import argparse
from collections.abc import Iterator

from tools.cases import CPU_CAVEAT, Results
from tools.families.attention.points import has_attention, only_attention
from tools.families.attention.tables import readme_tables
from tools.families.linear.hypotheses import judge_all
from tools.families.linear.readme_tables import REFERENCE, forward_table, training_table
from tools.files import ToolError, read_text, run, save
from tools.results import load_by_device

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ATTENTION = ("<!-- attention:begin -->", "<!-- attention:end -->")


def summary(groups: list[Results]) -> str:
    """A section for each group of results; headed by its device where there are several."""
    if len(groups) == 1:
        return section(groups[0])
    return "\n\n".join(f"### {_device(results)}\n\n{section(results)}" for results in groups)


def section(results: Results) -> str:
    """Forward table, training table and verdicts; ToolError where neither phase was measured."""
    text, forward = forward_table(results)
    trained_text, training = training_table(results)
    if not forward and not training:
        raise ToolError(
            f"{results.files[0]} has no forward and no training results: nothing to tabulate"
        )
    parts = []
    if forward:
        words = f"Forward, median ms of {_clock(results)} time."
        parts += [_caption(results, words, text), forward]
    if training:
        words = f"Training, median ms of {_clock(results)} time of one step."
        parts += [_caption(results, words, trained_text), training]
    # Of a number of ranks that decides nothing, the tables are all there is to say.
    if results.machine.get("ranks") in (None, 2):
        parts.append(
            "\n".join(
                f"- **{one.name} {one.status}**: *{one.claim}* {_sentence(one.headline)}"
                for one in judge_all(results)
            )
        )
    return "\n\n".join(part.strip() for part in parts)


def attention_summary(groups: list[Results]) -> str:
    """The tables of attention for each group of results that has any."""
    parts = []
    for results in groups:
        heading = f"### Attention, {results.device}"
        parts.append("\n\n".join([heading, *map(str.strip, _attention(results))]))
    return "\n\n".join(parts)


def _attention(results: Results) -> Iterator[str]:
    for words, text, table in readme_tables(results):
        words += f" Medians of {_clock(results)} time. Ratios are of speed: above 1 the first is "
        words += f"the faster, with 95% intervals. {_facts(results, results.device, text)}."
        yield f"**{CPU_CAVEAT}.** {words}" if results.cpu else words
        yield table


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def replaced(readme: str, content: str, path: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """`readme` with `content` between the markers; ToolError unless each is there once in order."""
    begin, end = marks
    for mark in marks:
        if readme.count(mark) != 1:
            raise ToolError(
                f"{path} has {readme.count(mark)} lines {mark}, and one is needed: "
                f"put {begin} and {end} where the table belongs"
            )
    if readme.index(begin) > readme.index(end):
        raise ToolError(f"{path} has {end} before {begin}: exchange them")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def _caption(results: Results, words: str, text: str) -> str:
    caption = f"{words} Ratios below 1: faster than {REFERENCE}, with their 95% intervals. "
    device = results.device if "ranks" in text else _device(results)
    caption += f"{_facts(results, device, text)}."
    return f"**{CPU_CAVEAT}.** {caption}" if results.cpu else caption


def _facts(results: Results, device: str, text: str) -> str:
    dates = sorted({date[:10] for date in results.dates if date})
    cold = "cold L2" if "cold" in results.caches else ""
    facts = [device, text, cold, results.versions, ", ".join(dates)]
    return "; ".join(fact for fact in facts if fact)


def _clock(results: Results) -> str:
    return "host" if results.cpu else "device"


def _device(results: Results) -> str:
    ranks = results.machine.get("ranks")
    return results.device + (f", {ranks} ranks" if ranks not in (None, 2) else "")


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.summary", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--readme", metavar="FILE", help="the file whose tables are written")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(argv)
    if options.check and not options.readme:
        raise ToolError("--check needs --readme FILE: it says whether that file is up to date")
    groups = load_by_device(options.files)
    linear = [results for results in groups if not only_attention(results)]
    attention = [results for results in groups if has_attention(results)]
    contents = [((BEGIN, END), summary(linear))] if linear else []
    contents += [(ATTENTION, attention_summary(attention))] if attention else []
    if not options.readme:
        print("\n\n".join(content for _, content in contents))
        return 0
    new = readme = read_text(options.readme)
    for marks, content in contents:
        new = replaced(new, content, options.readme, marks)
    if options.check:
        print(f"{options.readme} is {'up to date' if new == readme else 'out of date'}")
        return 0 if new == readme else 1
    if new != readme:
        save(options.readme, new)
    print(f"{options.readme} has the tables of {', '.join(options.files)}")
    return 0


if __name__ == "__main__":
    run(main)
