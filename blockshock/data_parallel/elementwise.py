"""What may be done with pieces of parameters: what treats each entry by itself."""

import torch
from torch import Tensor
from torch.utils._foreach_utils import _foreach_supported_types as _for_norms

ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
}  # fmt: skip


def check_elementwise(cls: type, method: str) -> None:
    """Raises ValueError unless a class of optimizers is known to be elementwise, or says so."""
    known = cls.__module__.startswith("torch.optim") and cls.__name__ in ELEMENTWISE
    if not known and not getattr(cls, "elementwise", False):
        raise ValueError(
            f"{cls.__name__}: a rank of {method} steps pieces of parameters, and that is right "
            "only where each entry is stepped by itself, which is not known of this class "
            "(Adafactor, LBFGS and Muon see whole matrices); use one of "
            f"{', '.join(sorted(ELEMENTWISE))}, or set elementwise = True on a class of your own "
            "if it is so"
        )


class PieceGradient(Tensor):
    """The gradient of this rank's pieces of parameters, of which other ranks have others.

    Raises TypeError for its norm and for the check of a `GradScaler`: they would be this rank's
    alone, and ranks have different pieces, so these cannot be made whole one by one.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _OF_ALL:
            raise TypeError(
                f"{func.__name__} of a rank's pieces of the gradient is not that of the whole "
                "gradient; use the wrapper's clip_grad_norm_(max_norm), which returns the norm, "
                "and bfloat16 instead of a GradScaler"
            )
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


_OF_ALL = {
    torch.linalg.vector_norm,
    torch.norm,
    Tensor.norm,
    torch._foreach_norm,
    torch._amp_foreach_non_finite_check_and_unscale_,
}
_for_norms.append(PieceGradient)  # PyTorch's fast paths ask for the type
