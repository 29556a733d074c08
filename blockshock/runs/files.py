"""Files that are written whole or not at all: beside their place first, then renamed into it.

Whatever ends the process, even a loss of power, leaves the old file or the new one. Two processes
that write one folder would write the same file beside: `alone` keeps the second one out.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from blockshock.runs.settings import Refused


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error.

    Raises:
        Refused: the disk is full, or cannot be written. What was at `path` is still there.
    """
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        kept = "; the file that was there is kept" if path.exists() else ""
        raise Refused(
            f"{path} cannot be written: {cause.strerror or cause}{kept}. Make room, or choose "
            "another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Holds `folder`, which is made, for this process; the system lets go when the process ends.

    busy: called where another process holds it. It raises, or the folder is waited for. A file
    system without locks (some network file systems) is not guarded.

    Raises:
        Refused: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / ".lock").open("w")
    except OSError as error:
        raise Refused(
            f"{folder} cannot be written: {error.strerror}. Choose another folder"
        ) from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield


def _os_error(error: BaseException) -> OSError | None:
    """The OSError at the root: torch.save wraps it in a RuntimeError of its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def _sync_folder(folder: Path) -> None:
    """The renaming itself is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
