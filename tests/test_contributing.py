"""The method that CONTRIBUTING shows is complete, and right on all ranks."""

import re
import sys
from pathlib import Path
from types import ModuleType

from blockshock.linear import METHODS
from tests import linear_jobs as jobs

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
MODULE = "blockshock.linear.mirror"


def shown():
    """The class in the page's first block of Python."""
    source = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    module = sys.modules[MODULE] = ModuleType(MODULE)
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    return module.Mirror


def errors(*args):
    """`jobs.errors` in a rank that knows the method."""
    METHODS["mirror"] = shown()
    try:
        return jobs.errors("mirror", *args)
    finally:
        del METHODS["mirror"], sys.modules[MODULE]


def test_the_method_shown_is_the_dense_layer(ranks):
    N, K = (4096, 2048) if ranks.device == "cuda" else (256, 128)
    jobs.check(ranks.run(errors, N, K, 192, "bf16"))
