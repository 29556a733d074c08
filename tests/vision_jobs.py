"""The command `python -m blockshock.block_sparse`, run by a pool of ranks instead of torchrun's."""

import contextlib
import io
from unittest import mock

import torch.distributed as dist

from blockshock.distributed.ranks import device
from blockshock.runs import ranks as processes
from blockshock.vision import data
from blockshock.vision.command import main
from tests.vision_runs import Made


def command(*arguments):
    """(exit code, what it wrote to stderr) of the command on the ranks of the pool."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    joined = processes.Ranks(rank, ranks, device(), dist.new_group(backend="gloo"))
    stderr = io.StringIO()
    with (
        mock.patch.object(processes, "join", return_value=joined),
        mock.patch.object(processes.Ranks, "leave"),
        mock.patch.object(data, "open_source", Made),
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main([*map(str, arguments)])
    return code, stderr.getvalue()
