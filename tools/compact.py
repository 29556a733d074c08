"""Result files made small: the same content without indentation and without what nobody reads.

    python -m tools.compact FILE...

Every number keeps its last digit. What goes is `options` of each benchmark: pytest-benchmark's own
settings of the run, which SCHEMA.md does not name and no tool reads. The files are rewritten in
place, whole or not at all.
"""

import argparse
import json
from pathlib import Path

from tools.files import read_text, run, save
from tools.results import load


def compacted(text: str) -> str:
    """The JSON of a result file, as short as it can be written."""
    content = json.loads(text)
    for entry in content["benchmarks"]:
        entry.pop("options", None)
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.compact", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE")
    files = [Path(file) for file in parser.parse_args(argv).files]
    for file in files:
        load(file)  # what is no result file is refused before any is written
    for file in files:
        before, text = file.stat().st_size, compacted(read_text(file))
        save(file, text)
        print(f"{file}: {before / 1e6:.2f} MB, now {len(text.encode()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    run(main)
