"""Block-Shock: a dense layer as a sum of 2:4-sparse terms on several GPUs, and its measuring.

convert(model, method) and revert(model) put a method in place of a model's linear layers and take
it out again; `blockshock.linear.METHODS` are the layers themselves.
"""

__version__ = "0.1.0"

__all__ = ["convert", "revert"]


def __getattr__(name: str):
    # Imported on first use: `python -m blockshock` explains a torch that cannot be imported.
    if name in __all__:
        from blockshock.linear import convert as conversion

        return getattr(conversion, name)
    raise AttributeError(f"module 'blockshock' has no attribute {name!r}")
