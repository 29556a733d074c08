"""Result files made small: the same results without indentation and without what nobody reads.

    python -m tools.compact FILE... [--commit ID]

The samples keep their last digit; every other number keeps six digits. What goes of each benchmark
is pytest-benchmark's own: the settings of the run, the parameters (`extra_info.case` has them), and
its statistics of the samples. The files are rewritten in place, whole or not at all.

--commit is of files that were measured in a copy of the code without its repository, and so do not
know theirs. Nothing tells whether that copy had changes, so they say that it had.
"""

import json
from pathlib import Path

from tools.files import ToolError, parser, read_text, run, save
from tools.results import COMMIT, load


def compacted(text: str, commit: str | None = None) -> str:
    """The JSON of a result file, as short as it can be written. commit: of a file without one."""
    content = json.loads(text)
    found = content.get("commit_info") or {}
    if commit and not COMMIT.fullmatch(str(found.get("id"))):
        content["commit_info"] = found | {"id": commit, "dirty": True}
    samples = [entry.pop("stats")["data"] for entry in content["benchmarks"]]
    content = _rounded(content)
    for entry, data in zip(content["benchmarks"], samples, strict=True):
        for name in ("options", "fullname", "params", "param"):
            entry.pop(name, None)
        entry["stats"] = {"data": data}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def _rounded(value):
    """The value with six digits in each of its numbers."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(argv: list[str]) -> int:
    command = parser("compact", __doc__)
    command.add_argument("--commit", metavar="ID", help="of the files that do not know theirs")
    options = command.parse_args(argv)
    if options.commit is not None and not COMMIT.fullmatch(options.commit):
        raise ToolError(f"--commit {options.commit!r} is no commit: give 7 to 40 hex digits")
    files = [Path(file) for file in options.files]
    for file in files:
        load(file)  # what is no result file is refused before any is written
    for file in files:
        before, text = file.stat().st_size, compacted(read_text(file), options.commit)
        save(file, text)
        print(f"{file}: {before / 1e6:.2f} MB, now {len(text.encode()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    run(main)
