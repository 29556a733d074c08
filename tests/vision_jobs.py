"""The command `python -m blockshock.block_sparse`, run by a pool of ranks on made-up images."""

from unittest import mock

from blockshock.vision import data
from blockshock.vision.command import main
from tests import lm_parallel_jobs
from tests.vision_runs import Made


def command(*arguments):
    """(exit code, what it wrote to stderr) of the command on the ranks of the pool."""
    with mock.patch.object(data, "open_source", Made):
        return lm_parallel_jobs.run(main, *arguments)
