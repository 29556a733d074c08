"""How a tool starts, ends and writes: one line for a wrong input, whole files or none.

A ToolError is what the user can mend. It is printed as one line, and the exit code is 2; 1 is kept
for what a gate found. A file is written beside its destination and then renamed, so an old file
stays whole until the new one is.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class ToolError(Exception):
    """A wrong input or an impossible output, in one line: what, where, and the fix."""


def save(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` whole or not at all; text is UTF-8 with its newlines kept.

    Raises ToolError when the folder cannot be made or the disk takes no more; what was at `path`
    before is then still there, and no partial file is left.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ToolError(f"{path} was not written: it is no file; name one")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise ToolError(f"{path} was not written: {reason}; nothing was changed") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; ToolError when it is missing, unreadable
    or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ToolError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ToolError(f"{path} is not a text file: byte {error.start} is not UTF-8") from error


def parser(tool: str, words: str, files: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command that reads FILE...; words: its module's docstring, as help."""
    made = argparse.ArgumentParser(
        prog=f"python -m tools.{tool}",
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("files", nargs="+", metavar="FILE", help=files)
    return made


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command and end the process: 0 done, 1 a gate failed, 2 an error in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal of ASCII shows "?" for the rest
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        # The reader of a pipe (head) has gone; the interpreter's own flush must not fail on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        print(f"error: the output was not written: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
