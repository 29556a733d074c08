"""The least time a step can take: arithmetic, memory traffic and wire traffic, overlapped.

    floor = max( FLOP / matrix rate,  bytes / copy bandwidth,  wire bytes / link bandwidth )

The three rates are measured on the machine (`ceilings`). A method states what one forward product
costs it per rank (`Cost`); the phases multiply: forward has one product, backward two (Y and dX),
training three (dW as well) and the optimizer's traffic. Arithmetic counts what must be multiplied:
a 2:4 term has half the products of its dense matrix, so its floor assumes tensor cores that run
2:4 at twice the dense rate, as the hardware states.
"""

from dataclasses import dataclass

PRODUCTS = {"forward": 1, "backward": 2, "training": 3, "correctness": 3, "drift": 1}

# Passes of the optimizer over each parameter: reads of weight and gradient, write of the weight,
# and a read and a write for every state tensor.
OPTIMIZER_PASSES = {"sgd": 3, "momentum": 5, "adam": 7}


@dataclass(frozen=True)
class Cost:
    """What one forward product costs one rank.

    flops: multiplications and additions. weight_bytes: bytes of the weight that must be read.
    activation_bytes: bytes of x read and y written. wire_forward, wire_backward: bytes sent by
    this rank for Y and for dX.
    """

    flops: float
    weight_bytes: float
    activation_bytes: float
    wire_forward: float
    wire_backward: float


def product_cost(
    B: int, N: int, K: int, itemsize: int, *, wire_forward: float = 0, wire_backward: float = 0
) -> Cost:
    """What X Wᵀ costs as a dense product, X [B, K] and W [N, K] of `itemsize` bytes an entry."""
    weight, activations = N * K * itemsize, B * (N + K) * itemsize
    return Cost(2 * B * N * K, weight, activations, wire_forward, wire_backward)


def all_reduce_wire(size: float, ranks: int) -> float:
    """Bytes each rank must send to all-reduce `size` bytes (reduce-scatter and all-gather)."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_wire(size: float, ranks: int) -> float:
    """Bytes each rank must send so that all have the gathered `size` bytes."""
    return (ranks - 1) / ranks * size


def step_floor(
    cost: Cost, ceilings: dict, *, phase: str, dtype: str, optimizer=None, trained_bytes=0, steps=1
) -> dict[str, float]:
    """Seconds of the floor and of its three terms, for one step of a phase.

    ceilings: as `measure.ceilings.measure` returns them. trained_bytes: bytes of the parameters an
    optimizer updates. A frozen weight has no third product: pass phase "backward" for it.
    """
    products = PRODUCTS[phase]
    flops = products * cost.flops
    moved = min(products, 2) * cost.weight_bytes + products * cost.activation_bytes
    if phase in ("training", "correctness"):
        moved += trained_bytes * (1 + OPTIMIZER_PASSES.get(optimizer, 0))  # dW is written once
    wire = cost.wire_forward + (cost.wire_backward if products > 1 else 0)
    terms = {
        "compute": flops / ceilings["matrix_flops"][dtype],
        "memory": moved / ceilings["copy_bytes_per_s"],
        "wire": wire / ceilings["link_bytes_per_s"] if wire else 0.0,
    }
    terms = {name: steps * seconds for name, seconds in terms.items()}
    return {"seconds": max(terms.values()), **terms}
