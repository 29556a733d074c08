"""The command `python -m blockshock.lm`, run by a pool of ranks instead of torchrun's."""

import contextlib
import io
from unittest import mock

import torch.distributed as dist

from blockshock.distributed.ranks import device
from blockshock.lm.__main__ import main
from blockshock.runs import ranks as processes


def command(*arguments):
    """(exit code, what it wrote to stderr) of the command on the ranks of the pool."""
    return run(main, *arguments)


def run(main, *arguments):
    """The same of any command that joins by `blockshock.runs.ranks`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    joined = processes.Ranks(rank, ranks, device(), dist.new_group(backend="gloo"))
    stderr = io.StringIO()
    with (
        mock.patch.object(processes, "join", return_value=joined),
        mock.patch.object(processes.Ranks, "leave"),
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main([*map(str, arguments)])
    return code, stderr.getvalue()
