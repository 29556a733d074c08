"""What `nvidia-smi` says about the GPUs, as plain data.

It answers without a CUDA context in this process, which the parent of a pool of ranks must not
have. It may be missing, broken, or stuck behind a hung driver: each of these is a `problem` in
words, never an exception, and a wait for no longer than the timeout, once a process.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from typing import NamedTuple

TIMEOUT = 6.0  # seconds; without persistence mode the driver wakes every GPU before it answers
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # `topo -m` underlines its header
_GPU = re.compile(r"GPU\d+")
_hung: str | None = None  # the problem of the call that ran into its timeout


class Reading(NamedTuple):
    """Rows that were read, or the reason why there are none."""

    rows: list
    problem: str | None


def query(fields: str, *, timeout: float = TIMEOUT) -> Reading:
    """`nvidia-smi --query-gpu=<fields>`: a dict a GPU, field -> text, or None where it says N/A."""
    text, problem = _run([f"--query-gpu={fields}", "--format=csv,noheader,nounits"], timeout)
    if problem:
        return Reading([], problem)
    names = fields.split(",")
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(names):
            return Reading([], f"nvidia-smi answered what cannot be read: {line[:80]!r}")
        rows.append(
            {n: None if c.startswith("[") else c for n, c in zip(names, cells, strict=True)}
        )
    return Reading(rows, None if rows else "nvidia-smi lists no GPU")


def visible_gpus(fields: str, *, timeout: float = TIMEOUT) -> Reading:
    """`query`, cut down to the GPUs of CUDA_VISIBLE_DEVICES and in its order: row i is `cuda:i`.

    Each row has "index", the GPU's number in nvidia-smi, beside the fields asked for.
    """
    rows, problem = query(f"index,uuid,{fields}", timeout=timeout)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not problem and not all((row["index"] or "").isdecimal() for row in rows):
        problem = f"nvidia-smi gives no number to a GPU: {rows[0]}"
    if problem or wanted is None:
        return Reading([] if problem else rows, problem)
    chosen = []
    for token in filter(None, (t.strip() for t in wanted.split(","))):
        match = [r for r in rows if r["index"] == token or (r["uuid"] or "").startswith(token)]
        if len(match) != 1 or match[0] in chosen:
            # CUDA itself stops at the first entry that it does not know.
            break
        chosen += match
    if chosen:
        return Reading(chosen, None)
    return Reading([], f"CUDA_VISIBLE_DEVICES={wanted!r} names none of the {len(rows)} GPUs")


def links(*, timeout: float = TIMEOUT) -> Reading:
    """How the GPUs are linked: `[gpu][gpu]` of "X" (itself), "NV18", "PIX", "SYS" …"""
    return _matrix(["topo", "-m"], timeout)


def peer_access(*, timeout: float = TIMEOUT) -> Reading:
    """Whether a GPU reads a peer's memory: `[gpu][gpu]` of "X" (itself), "OK", or a reason."""
    return _matrix(["topo", "-p2p", "r"], timeout)


def submatrix(matrix: list, gpus: list) -> list | None:
    """The part of a `links` or `peer_access` matrix between the given rows of `visible_gpus`."""
    chosen = [int(gpu["index"]) for gpu in gpus]
    if not matrix or max(chosen, default=0) >= len(matrix):
        return None
    return [[matrix[i][j] for j in chosen] for i in chosen]


def _matrix(arguments: list[str], timeout: float) -> Reading:
    text, problem = _run(arguments, timeout)
    if problem:
        return Reading([], problem)
    columns, rows = [], []
    for line in _ESCAPES.sub("", text).splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not columns:
            columns = [i for i, cell in enumerate(cells) if _GPU.fullmatch(cell)]
        elif _GPU.fullmatch(cells[0]) and len(cells) > columns[-1]:
            rows.append([cells[i] for i in columns])
    if not rows or len(rows) != len(columns):
        return Reading([], f"nvidia-smi {' '.join(arguments)} answered what cannot be read")
    return Reading(rows, None)


def _run(arguments: list[str], timeout: float) -> tuple[str, str | None]:
    """(output, None), or ("", what went wrong)."""
    global _hung
    if _hung:
        return "", _hung
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", "nvidia-smi was not found"
    try:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that a wrapper's children end with it
        )
    except OSError as error:
        return "", f"nvidia-smi does not start: {error.strerror or error}"
    with process.stdout:
        try:
            output = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)  # in the driver's hands it may not even die
            _hung = f"nvidia-smi did not answer in {timeout:g} s"
            return "", _hung
    text = output.decode(errors="replace")
    if process.returncode:
        lines = text.strip().splitlines() or ["(no output)"]
        return "", f"nvidia-smi failed with exit code {process.returncode}: {lines[0][:160]}"
    return text, None
