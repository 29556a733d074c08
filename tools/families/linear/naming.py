"""How cases of linear layers are named, ordered and compared."""

from tools.cases import Case, Naming, Result

METHODS = {  # colours and markers
    "dense_single": ("#7a7f87", "s"),
    "dense_tp_row": ("#0072b2", "o"),
    "dense_tp_column": ("#56b4e9", "^"),
    "masked_split": ("#cc79a7", "D"),
    "block_shock": ("#d55e00", "P"),
    "block_shock_folded": ("#009e73", "X"),
}
PHASES = ("correctness", "forward", "backward", "training", "drift")
# What a method may do in several ways; a label names those that are not the method's usual ones.
VARIANTS = ("mask", "kernel", "reduce")
SIZES = ("N", "K", "B")
# What a setting says in words of its own, or does not depend on; any other field is named.
KNOWN = {*SIZES, *VARIANTS, "dtype", "policy", "optimizer", "ranks", "steps", "seed"}
KNOWN |= {"bias", "input", "loss", "target", "weight"}


def label(result: Result) -> str:
    """Method, mask, policy in training, kernel and reduce: each only where it is unusual."""
    case, unusual = result.case, result.unusual
    trains = case.phase == "training" and case.policy != "plain"
    parts = [case.method, unusual.get("mask"), case.policy if trains else None]
    # "auto" alone would not say what is chosen.
    parts += [
        f"auto {name}" if unusual.get(name) == "auto" else unusual.get(name)
        for name in ("kernel", "reduce")
    ]
    return " · ".join(part for part in parts if part)


def run_label(result: Result) -> str:
    """The same as the run writes it."""
    unusual = result.unusual
    parts = [result.case.method, unusual.get("mask"), result.case.policy, unusual.get("kernel")]
    parts.append(f"reduce={unusual['reduce']}" if "reduce" in unusual else None)
    return "-".join(part for part in parts if part)


def setting(case: Case) -> str:
    """What two cases must share to be put on one line, or to be compared, in words: all but the
    method, its mask, kernel, reduce and policy, the sizes N and B, the seed, and what is usual
    (gaussian input, bias, two ranks, K=N).
    """
    found = sorted(case.fields.items())
    others = [(name, value) for name, value in found if name not in KNOWN and value is not None]
    parts = [
        case.dtype,
        case.optimizer if case.phase == "training" else None,
        f"{case.ranks} ranks" if case.ranks not in (None, 2) else None,
        "no bias" if case.bias is False else None,
        f"input {case.input}" if case.input not in (None, "gaussian") else None,
        f"loss {case.loss}" if case.loss not in (None, "mse_target") else None,
        f"target {case.target}" if case.target not in (None, "normal") else None,
        f"weight {case.weight}" if case.weight is not None else None,
        f"K={case.K}" if case.K not in (None, case.N) else None,
        *(f"{name}={value}" for name, value in others),
    ]
    return ", ".join(part for part in parts if part)


NAMING = Naming(
    methods=METHODS,
    phases=PHASES,
    sizes=SIZES,
    line=VARIANTS,
    ways=("kernel", "reduce"),
    label=label,
    run_label=run_label,
    setting=setting,
)
