"""What a run waits for, said now and then, so that a stuck rank is seen before the deadline."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

FIRST_SECONDS = 15.0  # a run that takes longer says what it waits for
EVERY_SECONDS = 30.0

State = tuple[int, str, float]  # a rank, what it is at, and for how many seconds


class Waiting:
    """The clock of one run: `limit` seconds, and a line to `tell` when it takes long."""

    def __init__(self, limit: float, tell: Callable[[str], None] | None):
        self._limit, self._tell = limit, tell
        self._began = time.monotonic()
        self.next = self._began + FIRST_SECONDS  # when the next line is due

    def look(self, ranks: Callable[[], Iterable[State]]) -> None:
        """Tells a line if one is due. ranks: all that are waited for."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + EVERY_SECONDS
        if self._tell is not None:
            seconds = f"{now - self._began:.0f} s, ends at {self._limit:g} s"
            self._tell(f"still waiting: {in_words(ranks())}; {seconds}")


def in_words(ranks: Iterable[State]) -> str:
    """[(0, "at: a", 7), (1, "at: a", 8)] -> "ranks 0, 1 at: a (8 s)", one part for each state."""
    states: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for rank, state, seconds in ranks:
        states[state].append((str(rank), seconds))
    return "; ".join(_together(state, *zip(*found, strict=True)) for state, found in states.items())


def _together(state: str, ranks: tuple[str, ...], seconds: tuple[float, ...]) -> str:
    long = f" ({max(seconds):.0f} s)" if max(seconds) >= 1 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} {state}{long}"


def at(note: str, *, stopped: bool = False, silent: float = 0.0) -> str:
    """The state of a rank in words. silent: seconds without a sign of life."""
    place = f"at: {note}" if note else "at the start"
    if stopped:
        return f"stopped by a signal (SIGSTOP; kill -CONT lets it go on) {place}"
    if silent:
        return f"without a sign of life for {silent:.0f} s (stopped?), last seen {place}"
    return place
