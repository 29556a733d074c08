"""The compressed form of a 2:4-sparse matrix: kept values, and what follows from the mask.

    values      [N, K/2]   the kept entries, row-major; written in place at any time
    codes       [N, K/4]   one byte a group of four: i0 | i1 << 2, the two kept places
    compressed  [N, 9K/16] cuSPARSELt's buffer; `values` is its head, metadata its tail (CUDA only)

The metadata is a function of the mask alone, so exact zeros among the values are data, and no
value that is written later needs a re-compression. For masks made of 4×4 tiles with two kept in
every row and column the transposed matrix is 2:4 as well; `with_transpose` keeps its values in
step, which is what makes a 2:4 input gradient dX = dY W possible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock import masks
from blockshock.kernels import (
    columns,
    cusparselt,
    graphs,
    kept_product,
    pack,
    products,
    sparse24,
    thin24,
    wide24,
)

BLOCK = cusparselt.BLOCK


class Packed24:
    """A 2:4-sparse matrix [N, K]; N and K multiples of 64, dtype float.

    Build it with `pack` from a dense matrix and a mask, or with `empty` and `write_rows` when the
    whole dense matrix does not fit. `values` may be written in place; the transposed values are
    refreshed when they are next asked for, or at once by `refresh`. Writes are noticed by the
    tensor's version counter; after one that does not count (through `.data`, or by a fused
    optimizer, whose kernels bypass it) call `mark_stale`.
    """

    def __init__(self, values: Tensor, codes: Tensor, compressed: Tensor | None):
        self.values, self.codes, self.compressed = values, codes, compressed
        self._transposed: Packed24 | None = None
        self._thin: thin24.Layout | None = None
        self._wide: Tensor | None = None  # the places of `wide24`
        self._period = None  # of the mask; unknown while the codes are being written
        self._library_places = False
        self._seen = -1

    @classmethod
    def empty(cls, rows: int, columns: int, *, dtype: torch.dtype, device) -> "Packed24":
        """Room for a matrix [rows, columns]; `write_rows` must fill every row."""
        check_shape(rows, columns)
        device = torch.device(device)
        reason = cusparselt.unsupported(dtype, device.type)
        if reason:
            raise ValueError(reason)
        codes = torch.empty(rows, columns // 4, dtype=torch.uint8, device=device)
        if device.type != "cuda":
            values = torch.empty(rows, columns // 2, dtype=dtype, device=device)
            return cls(values, codes, None)
        width = columns * 9 // 16  # half the values, and metadata of an eighth of their size
        compressed = torch.empty(rows, width, dtype=dtype, device=device)
        values = compressed.view(-1)[: rows * columns // 2].view(rows, columns // 2)
        return cls(values, codes, compressed)

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> "Packed24":
        """From a dense matrix [N, K] and a bool mask [N, K] with two kept in every four."""
        packed = cls.empty(*weight.shape, dtype=weight.dtype, device=weight.device)
        packed.write_rows(0, weight, mask)
        return packed

    @classmethod
    def from_codes(cls, values: Tensor, codes: Tensor) -> "Packed24":
        """From kept values [N, K/2] and codes [N, K/4], both copied; the codes are checked."""
        rows, columns = values.shape[0], values.shape[1] * 2
        packed = cls.empty(rows, columns, dtype=values.dtype, device=values.device)
        packed.values.copy_(values)
        packed.codes.copy_(codes)
        packed._write_metadata()
        return packed

    def with_transpose_if_possible(self) -> "Packed24":
        """`with_transpose` where the mask allows it, else nothing. Returns self."""
        try:
            return self.with_transpose()
        except ValueError:
            return self

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense matrix."""
        return self.values.shape[0], self.values.shape[1] * 2

    @torch.no_grad()
    def write_rows(self, start: int, weight: Tensor, mask: Tensor) -> None:
        """Fills rows start.. from a dense block [n, K] and its mask; start and n multiples of 64.

        The mask is checked for two of four.
        """
        check_shape(*weight.shape)
        if start % cusparselt.ROWS_MULTIPLE:
            raise ValueError(f"start = {start}: rows are written in blocks that begin at 64·n")
        stop = start + weight.shape[0]
        masks.check(mask)
        self.codes[start:stop] = masks.encode(mask)
        pack.gather_kept(weight, self.codes[start:stop], out=self.values[start:stop])
        if self.compressed is not None:
            cusparselt.write_metadata(self.compressed, mask, start)

    def unpack(self) -> Tensor:
        """The dense matrix [N, K], zeros where nothing is kept."""
        return pack.expand(self.values, self.codes)

    def mask_period(self) -> tuple[int, int, int, int] | None:
        """`masks.period` of the whole mask; looked up once, so only when all rows are written."""
        if self._period is None:
            self._period = (masks.period(self.codes),)
        return self._period[0]

    def product(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        kernel: str = "cusparselt",
        partials: wide24.Buffers | None = None,
    ) -> Tensor:
        """X Wᵀ (+ bias [N]): x [B, K] -> [B, N], contiguous. kernel: a name in `kernels.products`.

        partials: with "wide" alone, for the sum of this product and the other rank's (`wide24`).
        "folded" takes x [B, K/2] as well: the kept columns. Raises ValueError for an unknown kernel
        and one that cannot run on x's device, for operands of another size or dtype, and for all
        but "cusparselt" after `recompress`, whose values only the library can read.
        """
        if self._library_places and kernel != "cusparselt":
            raise ValueError(
                f"kernel {kernel!r} reads values by their codes, and the library compressed this "
                "matrix again with places of its own; use `rewrite` in place of `recompress`"
            )
        if partials is not None and kernel != "wide":
            raise ValueError(f"kernel {kernel!r} adds nothing; give `partials` with 'wide' alone")
        if kernel == "folded":
            return F.linear(self.kept_input(x), self.values, bias)
        if kernel in ("thin", "wide"):
            self._check_operands(x, bias)
        # Both run on the current device.
        if kernel == "thin":
            places, most = self._thin_layout(), thin24.MAX_BATCH
            with torch.cuda.device_of(x):
                done = [thin24.product(some, self.values, places, bias) for some in x.split(most)]
            return done[0] if len(done) == 1 else torch.cat(done)
        if kernel == "wide":
            places = self._wide_places()
            with torch.cuda.device_of(x):
                return wide24.product(x, self.values, places, bias, partials)
        if kernel not in ("cusparselt", "plain"):
            raise ValueError(f"unknown kernel {kernel!r}; use cusparselt, thin, wide or folded")
        return sparse24.product(x, self.compressed, self.values, self.codes, bias)

    def kept_input(self, x: Tensor) -> Tensor:
        """The columns [B, K/2] that a mask of whole columns keeps of x; given those, they pass."""
        if x.shape[1] == self.values.shape[1]:
            return x
        period = self.mask_period()
        if products.kind(period) != "columns":
            raise ValueError(
                "this mask keeps other columns in each row, so its product cannot be folded; use "
                "kernel 'auto'"
            )
        return columns.take(x, masks.places(period[0]))

    def kept_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """The kept entries [N, K/2] of dYᵀ X: dy [B, N], x [B, K] (or its kept columns).

        A periodic mask needs half the products: row r of every four multiplies only the columns
        that its code keeps. With any other mask it is `kernels.kept_product`.
        """
        period = self.mask_period()
        kind = products.kind(period)
        if kind == "free":
            return kept_product.kept_product(dy, x, self.codes)
        if kind == "columns":
            return dy.t() @ self.kept_input(x)
        N, K = self.shape
        kept = {code: columns.take(x, masks.places(code)) for code in set(period)}
        out = dy.new_empty(N // 4, 4, K // 2)
        for row, plane in enumerate(columns.quads(dy)):
            torch.mm(plane.t(), kept[period[row]], out=out[:, row])
        return out.view(N, K // 2)

    def _check_operands(self, x: Tensor, bias: Tensor | None) -> None:
        """For kernels that read addresses; PyTorch checks the operands of the others."""
        (N, K), dtype, device = self.shape, self.values.dtype, self.values.device
        for name, given, size in (("x", x, K), ("bias", bias, N)):
            if given is None:
                continue
            if given.shape[-1] != size or given.dtype != dtype or given.device != device:
                raise ValueError(
                    f"{name} is {list(given.shape)} of {given.dtype} on {given.device}, and W is "
                    f"{[N, K]} of {dtype} on {device}; give {name} {size} columns, of that dtype, "
                    "on that device"
                )

    def _thin_layout(self) -> thin24.Layout:
        if self._thin is None:
            graphs.refuse_capture("the thin kernel has no indices of this mask")
            self._thin = thin24.layout(self.codes, self.mask_period())
        return self._thin

    def _wide_places(self) -> Tensor:
        if self._wide is None:
            graphs.refuse_capture("the wide kernel has no places of this mask")
            self._wide = wide24.arrange_places(self.codes)
        return self._wide

    @torch.no_grad()
    def with_transpose(self) -> "Packed24":
        """Adds the packed form of Wᵀ, kept in step from now on. Returns self.

        Raises ValueError when the mask does not keep two in each column of each 4×4 tile.
        """
        rows, columns = self.shape
        twin = Packed24.empty(columns, rows, dtype=self.values.dtype, device=self.values.device)
        for start in range(0, rows, BLOCK):
            block = masks.transpose(self.codes[start : start + BLOCK])
            twin.codes[:, start // 4 : start // 4 + block.shape[1]] = block
        twin._write_metadata()
        twin.mask_period()  # looked up now: it waits for the device, and a capture may not
        self._transposed = twin
        self.refresh()
        return self

    @property
    def has_transpose(self) -> bool:
        """Whether Wᵀ is kept as well."""
        return self._transposed is not None

    @property
    def transposed(self) -> "Packed24":
        """The packed Wᵀ, [K, N]; its values are brought into step first if W's were written."""
        if self._transposed is None:
            raise ValueError("no transposed form is kept; call with_transpose() first")
        if self.stale:
            self.refresh()
        return self._transposed

    @property
    def stale(self) -> bool:
        """Whether the values were written since the transposed ones were made of them."""
        return self._seen != self.values._version

    def mark_stale(self) -> None:
        """Says that the values were written; the transpose is refreshed before its next use."""
        self._seen = -1

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the values into the transposed form now, if there is one."""
        self._seen = self.values._version
        if self._transposed is not None:
            twin = self._transposed
            pack.transpose_kept(self.values, self.codes, twin.codes, out=twin.values)

    @torch.no_grad()
    def rewrite(self, weight: Tensor) -> None:
        """Takes the kept values of a dense matrix [N, K], at the places of the codes."""
        if self._library_places:
            self._write_metadata()
            if self._transposed is not None:
                self._transposed._write_metadata()
        pack.gather_kept(weight, self.codes, out=self.values)
        self.mark_stale()

    @torch.no_grad()
    def recompress(self, weight: Tensor) -> None:
        """Compresses a dense matrix [N, K] again, values and metadata, as PyTorch's own 2:4 does.

        The mask must be the one this form was made with. On CUDA cuSPARSELt finds the places
        itself; where a kept entry is exactly zero it may name another place for that zero, so
        `values` then no longer match `codes` entry by entry. The library's products are unchanged,
        the other kernels refuse. (The cost that users of PyTorch's 2:4 pay; `rewrite` avoids it.)
        """
        if self.compressed is None:
            pack.gather_kept(weight, self.codes, out=self.values)
        else:
            self.compressed.copy_(torch._cslt_compress(weight).view_as(self.compressed))
            self._library_places = True
        self._seen = self.values._version
        if self._transposed is not None:
            self._transposed.recompress(weight.t().contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes held: values, metadata and codes, of W and of Wᵀ when it is kept."""
        head = self.values if self.compressed is None else self.compressed
        own = head.nbytes + self.codes.nbytes + (self._thin.nbytes if self._thin else 0)
        own += 0 if self._wide is None else self._wide.nbytes
        return own + (self._transposed.nbytes if self._transposed is not None else 0)

    def _write_metadata(self) -> None:
        check_codes(self.codes)
        if self.compressed is not None:
            cusparselt.write_all_metadata(self.compressed, self.codes)
        self._library_places = False


def estimated_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a 2:4 matrix by its definition: half the values, and two bits of place for each."""
    kept = rows * columns // 2
    return kept * itemsize + kept // 4


def check_codes(codes: Tensor) -> None:
    """Raises ValueError unless each of the codes [N, K/4] names two places of four."""
    for some in codes.split(BLOCK):
        masks.check(masks.decode(some))


def check_shape(rows: int, columns: int) -> None:
    """Raises ValueError unless both sizes are multiples of 64, which the 2:4 kernels need."""
    for name, size in (("N", rows), ("K", columns)):
        if size <= 0 or size % cusparselt.ROWS_MULTIPLE:
            raise ValueError(
                f"{name} = {size} is not a multiple of {cusparselt.ROWS_MULTIPLE}, as 2:4 needs; "
                f"pad the weight to {-(-max(size, 1) // 64) * 64} or use a dense method"
            )
