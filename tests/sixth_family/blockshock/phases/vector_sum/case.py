"""A case of vector sums."""

import zlib
from dataclasses import dataclass, replace
from typing import ClassVar

from blockshock.phases.case import Case, about
from blockshock.vector_sum import METHODS


@dataclass(frozen=True)
class VectorSumCase(Case):
    """One measurement: a method, at one length."""

    methods: ClassVar = METHODS
    prefix: ClassVar = "vector_sum_"

    n: int = about("entries of a vector")
    scale: str = about("size of the entries", "one", names=("one", "large"), shown=True)
    family: str = about("what is computed", "vector_sum", kw_only=True)

    @property
    def label(self) -> str:
        """The method."""
        return self.method

    @property
    def point_label(self) -> str:
        """n1000-fp32."""
        return f"n{self.n}-{self.dtype}" + ("" if self.scale == "one" else f"-scale={self.scale}")

    @property
    def point(self) -> "VectorSumCase":
        """What the methods measured side by side have in common."""
        return replace(self, method="plain")

    @property
    def problem_seed(self) -> int:
        """Of x and y."""
        return zlib.crc32(f"{self.seed} {self.n}".encode())

    def unsupported(self, device_type: str) -> str | None:
        """Why it cannot run, or None."""
        if self.method == "halves" and self.n % 2:
            return f"halves needs an even n, found n = {self.n}"
        return None
