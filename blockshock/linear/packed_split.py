"""A layer whose weight is multiplied in packed form, and how that form follows the weight.

Whatever writes the weight (an optimizer, a graph's replay, `load_state_dict`, a cast), the packed
form is brought into step before it is multiplied: at each forward, so a captured step has it as
well, unless the weight is frozen and unchanged; and anew where the weight is another tensor or the
mask another one.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from blockshock import masks as masks24
from blockshock.distributed import collectives
from blockshock.linear import parts
from blockshock.linear.masters import MASTERS
from blockshock.linear.split import Split
from blockshock.measure.regions import region
from blockshock.packed import Packed24, check_codes


class PackedSplit(Split):
    """One 2:4 term. weight: as `masters` says; bias: of the weight's dtype."""

    def __init__(self, packed: Packed24, master: str, term: parts.Term, K: int, bias, group):
        own = MASTERS[master].parameter(packed)
        super().__init__(own, bias, packed.shape[0], K, group)
        self.master, self.term = master, term
        if bias is not None:
            self.bias.data = self.bias.data.to(own.dtype)
        self._seen: tuple | None = None  # `written` at the last upkeep; None: it may have changed
        self._settle(packed)

    def _joins(self):
        """(output, input) for a mask; see `functions.Layer`."""
        raise NotImplementedError

    @property
    def codes(self) -> Tensor:
        """The mask of this term, uint8 [N, K/4S]."""
        return self.packed.codes

    @property
    def added(self) -> Tensor | None:
        """The bias's values in the products' dtype [N]."""
        return None if self.bias is None else self.bias.detach().to(self.packed.values.dtype)

    def prepare_gradients(self) -> None:
        """Brings the transpose into step, where dX needs it; in a graph at each replay."""
        packed = self.packed
        if packed.has_transpose and (packed.stale or self._capturing):
            with region("compress"):
                packed.refresh()

    def upkeep(self) -> None:
        """Brings the packed form into step with the weight; see `masters`.

        `forward` does it by itself: at each call while the weight requires a gradient; of a frozen
        one after a write that PyTorch counts, and once after its memory was taken (`.data`,
        `detach()`). Call it after a write that leaves no trace, such as a graph's replay or a
        collective.
        """
        in_training = region("compress") if torch.is_grad_enabled() else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), in_training:
            if self._apart:
                self._rebuild()
            MASTERS[self.master].renew(self.part, self.packed, by_library=self._by_library)
            # Graphs of a frozen layer renew nothing themselves.
            if not self.weight.requires_grad and self.packed.stale:
                self.packed.refresh()

    def check_pair(self) -> None:
        """Raises ValueError unless the partner rank holds the exact complement. A collective.

        Masks are made on each rank from its own copy of the weight: copies that differ show here.
        """
        codes = collectives.all_gather(self.codes, self.group)
        partner = codes[collectives.group_rank(self.group) ^ 1]
        if not torch.equal(masks24.complement(partner), self.codes):
            raise ValueError(
                "the two terms of a pair are not each other's complement: the ranks were given "
                "different weights; broadcast the model from one rank first"
            )

    def mask_state(self) -> dict[str, Tensor]:
        """The codes: a state brings its own mask."""
        return {"codes": self.codes}

    def of_first_term(self, mask: Tensor) -> Tensor:
        """A term's codes are its partner's complement."""
        return masks24.complement(mask) if self.term.index else mask

    def __deepcopy__(self, memo: dict) -> "PackedSplit":
        """In the same process group, in memory of its own."""
        with torch.inference_mode(False):
            twin = super().__deepcopy__(memo)
            twin._rebuild()
        return twin

    def _apply(self, fn, recurse=True):
        with torch.inference_mode(False):
            dtype = fn(self.packed.values.new_empty(0)).dtype
            own = {name: p for name, p in self._parameters.items() if p is not None}
            before = {name: p.data for name, p in own.items()}
            grads = {name: p.grad.data for name, p in own.items() if p.grad is not None}
            super()._apply(fn, recurse)
            if MASTERS[self.master].dtype(dtype) != dtype:  # moved, not rounded on the way
                for name, values in before.items():
                    parameter = self._parameters[name]
                    parameter.data = values.to(parameter.device)
                    if name in grads:  # of the same dtype: grouped steps do not ask
                        parameter.grad.data = grads[name].to(parameter.device)
            if self._apart or dtype != self.packed.values.dtype:  # else graphs may hold its memory
                self._rebuild(dtype)
        return self

    def _another(self, state) -> str | None:
        problem = super()._another(state)
        if problem is None:
            try:
                check_codes(self._read(state)[1][0])
            except ValueError as error:
                return f"the state's codes are no 2:4 mask: {error}"
        return problem

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.upkeep()  # of the same mask in the same memory, which graphs may hold

    def _settle(self, packed: Packed24) -> None:
        """Takes a packed form of the weight; its values become the weight, if they are shared."""
        self.packed = packed
        if MASTERS[self.master].shared:
            self.weight.data = packed.values
        self._seen, self._seen_codes = None, self.codes._version
        self.output, self.input = self._joins()

    @torch.no_grad()
    def _rebuild(self, dtype: torch.dtype | None = None) -> None:
        """Another packed form, of the weight as it is; dtype: of the products, if it is another."""
        master, codes = MASTERS[self.master], self.codes.to(self.weight.device)
        dtype = dtype or master.products(self.weight.dtype, self.packed.values.dtype)
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.dtype != master.dtype(dtype):
                parameter.data = parameter.data.to(master.dtype(dtype))
        kept = master.kept(self.part, codes).to(dtype)
        self._settle(Packed24.from_codes(kept, codes).with_transpose_if_possible())

    @property
    def _capturing(self) -> bool:
        """Whether a graph is being captured that may be replayed after the weight was stepped."""
        return self.weight.requires_grad and self._in_capture

    @property
    def _in_capture(self) -> bool:
        return self.weight.is_cuda and torch.cuda.is_current_stream_capturing()

    @property
    def _apart(self) -> bool:
        """Whether weight or mask are others than those that the packed form was made of."""
        master, weight, values = MASTERS[self.master], self.weight, self.packed.values
        return (
            self.codes._version != self._seen_codes
            or (master.shared and weight.data_ptr() != values.data_ptr())
            or weight.dtype != master.dtype(values.dtype)
            or weight.device != values.device
        )

    def _follow_weight(self) -> None:
        """`upkeep`, unless the weight is frozen and was not written since the last one.

        Not all writes leave a trace: a fused optimizer's step and a graph's replay leave none. So
        a weight that can be trained counts as written, in evaluation as well.
        """
        if self.weight.requires_grad or self.written() != self._seen or self._apart:
            self.upkeep()
            # What a capture recorded has not been done yet.
            unknown = self.weight.requires_grad or self._in_capture
            self._seen = None if unknown else self.written()
