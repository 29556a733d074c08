"""Block-Shock: a dense layer as a sum of 2:4-sparse terms on several GPUs, and its measuring.

convert(model, method) and revert(model) put a method in place of a model's linear layers and take
it out again; check_inputs(model) compares what its ranks are given, and ignore_in_ddp(model) keeps
DistributedDataParallel from the parts of their weights. `blockshock.linear.METHODS` are the layers.
"""

from blockshock.version import __version__

__all__ = ["__version__", "check_inputs", "convert", "ignore_in_ddp", "revert"]


def __getattr__(name: str):
    # Imported on first use: `python -m blockshock` explains a torch that cannot be imported.
    if name in ("convert", "revert"):
        from blockshock.linear import convert as conversion

        return getattr(conversion, name)
    if name == "ignore_in_ddp":
        from blockshock.linear import trainers

        return trainers.ignore_in_ddp
    if name == "check_inputs":
        from blockshock.linear import alike

        return alike.check_inputs
    raise AttributeError(f"module 'blockshock' has no attribute {name!r}")
