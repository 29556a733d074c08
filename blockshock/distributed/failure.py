"""How a failed run is told: what happened first, in doing what, and where the others stood."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

STOPPED = "was stopped by a signal (SIGSTOP)"


class RankFailure(RuntimeError):
    """A run did not come back from every rank.

    Attributes:
        kind: "raised" (an exception), "exited" (sys.exit, os._exit or a signal), "hung" (no answer
            within the deadline).
        rank: the rank that failed first; of several that hang, the lowest.
        exc_type: the name of the exception's class, else None. Running out of CUDA memory is always
            "OutOfMemoryError", whichever library noticed it.
        note: what that rank said last with `note()`.
        detail: tracebacks, and the stacks of the ranks that did not answer.
    """

    def __init__(
        self,
        headline: str,
        *,
        kind: str,
        rank: int,
        exc_type: str | None = None,
        note: str = "",
        detail: str = "",
    ):
        super().__init__(f"{headline}\n{detail}".rstrip())
        self.kind, self.rank, self.exc_type = kind, rank, exc_type
        self.note, self.detail = note, detail


@dataclass
class Report:
    """What became of one rank in a run that failed."""

    rank: int
    kind: str = "hung"  # "answered", "raised", "exited", "hung"
    error: dict[str, Any] = field(default_factory=dict)  # here.describe() of an exception
    code: int | None = None  # exit code; negative: the signal that killed it
    note: str = ""
    stack: str = ""
    alive: bool = False  # it could not be killed
    stopped: bool = False  # a signal had stopped its process

    def told(self, error: dict[str, Any]) -> None:
        """Takes in what the rank said about its own failure."""
        self.error, self.kind = error, "raised"
        if error["code"] is not None:
            self.kind, self.code = "exited", error["code"]

    def words(self, size: int) -> str:
        """One line: which rank, and what it did."""
        who = f"rank {self.rank} of {size}"
        if self.kind == "raised":
            return f"{who} raised {self.error['exc_type']}: {self.error['text']}"
        if self.kind == "exited":
            return f"{who} {_exit_words(self.code)}"
        if self.kind == "answered":
            return f"{who} had answered"
        return f"{who} {STOPPED if self.stopped else 'had not answered'}"


def compose(reports: list[Report], first: Report, *, limit: float, call: str) -> RankFailure:
    """The failure of a run, from the reports of all ranks.

    Args:
        first: the one that is the cause. limit: seconds the run had. call: the function's name.
    """
    size = len(reports)
    headline = first.words(size)
    if first.kind == "raised" and all(_same(r, first) for r in reports) and size > 1:
        headline = f"{first.error['exc_type']}: {first.error['text']}\non every one of {size} ranks"
    elif first.kind == "hung":
        silent = [r for r in reports if r.kind == "hung" and r.stopped == first.stopped]
        numbers, plural = ", ".join(str(r.rank) for r in silent), "s" if len(silent) > 1 else ""
        why = f"{STOPPED} and " if first.stopped else ""
        headline = f"rank{plural} {numbers} of {size} {why}did not answer within {limit:g} s"
    headline += f", in {call}" + (f", while: {first.note}" if first.note else "")
    others = [r for r in reports if r is not first and not _same(r, first)]
    return RankFailure(
        headline,
        kind=first.kind,
        rank=first.rank,
        exc_type=first.error.get("exc_type") if first.kind == "raised" else None,
        note=first.note,
        detail="\n".join([_body(first, size), *(_section(r, size) for r in others)]).strip("\n"),
    )


def trim_stack(text: str) -> str:
    """faulthandler's dump without the rank's own machinery: what watches and what calls."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if " in _follow_parent" in block:
            continue
        lines = block.split("\n")
        calls = [
            i for i, line in enumerate(lines) if 'rank_main.py"' in line and " in _call" in line
        ]
        blocks.append("\n".join(lines[: calls[0]] if calls else lines))
    return "\n\n".join(blocks)


def _same(one: Report, other: Report) -> bool:
    return one.kind == other.kind == "raised" and all(
        one.error[key] == other.error[key] for key in ("exc_type", "text")
    )


def _section(report: Report, size: int) -> str:
    note = f", while: {report.note}" if report.note else ""
    return f"\n--- {report.words(size)}{note}\n{_body(report, size)}".rstrip()


def _body(report: Report, size: int) -> str:
    lines = [text.rstrip() for text in (report.error.get("traceback"), report.stack) if text]
    if report.kind == "hung" and lines:
        lines.insert(0, f"rank {report.rank} of {size} stands here:")
    if report.alive:
        lines.append(f"rank {report.rank} of {size} could not be killed: it is still there")
    return "\n".join(lines)


def _exit_words(code: int | None) -> str:
    """An exit code in words, signals by name."""
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
