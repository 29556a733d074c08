"""Which optimizers may step a part of a parameter: those that step each entry by itself."""

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
