"""The doctor, `python -m blockshock`: what this machine can run, what will be skipped, and why.

Exit code 0 when the suite can run here, on GPUs or on the CPU, else 1. `--json` prints the same
facts for programs.
"""

import argparse
import json
import sys

# What stays out of the suite where a capability is missing.
SKIPPED = {
    "gloo": "ranks on the CPU",
    "cuda": "all that runs on GPUs: NCCL, CUDA graphs, device timings",
    "two_gpus": "methods of several ranks on GPUs",
    "cusparselt": "2:4 kernels (on the CPU the same arithmetic runs in plain PyTorch)",
    "triton": "our own kernels on GPUs",
    "triton_interpreter": "our own kernels on the CPU, under Triton's interpreter",
    "symmetric_memory": "reduces through symmetric memory (NCCL's is measured)",
    "safetensors": "weights and activations from .safetensors files (.npy is read)",
}


def examine() -> dict:
    """All that the doctor says, as JSON-able data.

    Keys: "runs_on" ("cuda", "cpu" or None), "machine" (`environment.describe`), "clocks" and
    "no_clocks", "cuda" (whether CUDA starts, and the peers torch sees), "capabilities".
    """
    from blockshock.measure import environment
    from blockshock.measure.capabilities import capabilities

    can = capabilities()
    machine = environment.describe()
    count = environment.gpu_count()
    why_not = environment.why_no_clocks()
    cuda = start_cuda(count, machine["problem"])
    runs_on = "cuda" if can["cuda"].ok and not cuda["problem"] else "cpu"
    return {
        "runs_on": runs_on if runs_on == "cuda" or can["gloo"].ok else None,
        "machine": machine,
        "clocks": None if why_not else environment.clocks(list(range(count))),
        "no_clocks": why_not,
        "cuda": cuda,
        "capabilities": {
            name: {**have._asdict(), "skipped": None if have.ok else SKIPPED[name]}
            for name, have in can.items()
        },
    }


def start_cuda(count: int, doubt: str | None) -> dict:
    """Really start CUDA, which only the doctor may: {"started", "problem", "peers": [gpu][gpu]}.

    Counting GPUs proves no working driver. With a driver that hangs this would hang too, so where
    `doubt` says that `nvidia-smi` did not answer it is not tried.
    """
    import torch

    if not count:
        return {"started": False, "problem": None, "peers": None}
    if doubt and "did not answer" in doubt:
        return {"started": False, "problem": f"not tried: {doubt}", "peers": None}
    try:
        for index in range(count):
            torch.cuda.get_device_properties(index)
        peers = [
            [i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)]
            for i in range(count)
        ]
    except (RuntimeError, AssertionError) as error:
        return {"started": False, "problem": str(error).strip().splitlines()[0], "peers": None}
    return {"started": True, "problem": None, "peers": peers}


def show(facts: dict) -> str:
    """The same facts for people."""
    lines = [f"Block-Shock {facts['machine']['version']}: what this machine can run", ""]
    rows = _machine_rows(facts)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        first, *rest = text.splitlines()
        lines.append(f"  {name:<{width}}  {first}")
        lines += [f"  {'':<{width}}  {line}" for line in rest]
    lines.append("")
    width = max(map(len, facts["capabilities"]))
    for name, have in facts["capabilities"].items():
        lines.append(f"  {'yes' if have['ok'] else 'no ':3}  {name:<{width}}  {have['found']}")
        if not have["ok"]:
            lines.append(f"       {'':<{width}}  needed: {have['needed']}")
            lines.append(f"       {'':<{width}}  skipped: {have['skipped']}")
    return "\n".join([*lines, "", *_conclusion(facts), ""])


def _machine_rows(facts: dict) -> list[tuple[str, str]]:
    machine, cuda = facts["machine"], facts["cuda"]
    built = [("CUDA", "cuda"), ("NCCL", "nccl"), ("cuSPARSELt", "cusparselt"), ("Triton", "triton")]
    rows = [
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("processor", f"{machine['cpu']}, {machine['cpu_cores']} cores"),
        ("torch", machine["torch"]),
        *((name, machine[key] or "none") for name, key in built),
    ]
    if machine["kind"] == "cpu":
        return [*rows, ("GPUs", "none that torch sees")]
    rows += [("GPUs", machine["device"]), ("driver", machine["driver"] or "unknown")]
    gpus = machine["gpus"]
    if gpus:
        rows.append(("memory", _each([_unit(g["memory_bytes"], "GiB", 2**30) for g in gpus])))
        rows.append(("power limit", _each([_unit(g["power_limit_w"], "W") for g in gpus])))
    if machine["topology"] and len(gpus) > 1:
        rows.append(("links", _table(machine["topology"])))
    if cuda["peers"] and len(cuda["peers"]) > 1:
        answers = [["yes" if peer else "no" for peer in row] for row in cuda["peers"]]
        rows.append(("peer access", _table(answers)))
    rows.append(("clocks", _clocks(facts)))
    problems = [machine["problem"], cuda["problem"] and f"CUDA does not start: {cuda['problem']}"]
    return rows + [("problem", problem) for problem in problems if problem]


def _conclusion(facts: dict) -> list[str]:
    count = len(facts["cuda"]["peers"] or [])
    missing = [name for name, have in facts["capabilities"].items() if not have["ok"]]
    rest = f"Skipped for want of: {', '.join(missing)}." if missing else "Nothing is skipped."
    if facts["runs_on"] is None:
        return ["Nothing can run here: neither GPUs nor ranks on the CPU."]
    if facts["runs_on"] == "cuda" and count == 1:
        return [
            "`make test` and `make bench` run here on two gloo ranks of the CPU: a layer is shared "
            "by two GPUs.",
            "`pytest bench --ranks 1` measures what one GPU can do alone: the dense methods. "
            + rest,
        ]
    if facts["runs_on"] == "cuda":
        return [f"`make test` and `make bench` run here on {_count(count, 'GPU')}. {rest}"]
    return [
        f"`make test` and `make bench` run here on two gloo ranks of the CPU. {rest}",
        "What they prove about correctness holds everywhere; their times say nothing about GPUs.",
    ]


def _table(matrix: list[list[str]]) -> str:
    names = [f"GPU{i}" for i in range(len(matrix))]
    rows = [["", *names], *([name, *row] for name, row in zip(names, matrix, strict=True))]
    width = max(len(cell) for row in rows for cell in row)
    return "\n".join("  ".join(f"{cell:<{width}}" for cell in row).rstrip() for row in rows)


def _clocks(facts: dict) -> str:
    if facts["clocks"] is None:
        return f"cannot be read: {facts['no_clocks']}"
    units = {"sm_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}
    return "\n".join(
        f"GPU{i} " + ", ".join(_unit(now[name], unit) for name, unit in units.items())
        for i, now in enumerate(facts["clocks"])
    )


def _each(values: list[str]) -> str:
    if len(set(values)) == 1:
        return values[0] + (" each" if len(values) > 1 else "")
    return ", ".join(values)


def _unit(value: float | None, unit: str, scale: int = 1) -> str:
    return "unknown" if value is None else f"{round(value / scale, 1):g} {unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def main(arguments: list[str] | None = None) -> int:
    """Examine, print, and say by the exit code whether anything can run."""
    parser = argparse.ArgumentParser(prog="python -m blockshock", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    options = parser.parse_args(arguments)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        print(f"torch cannot be imported: {error}\nneeded: torch 2.10 or newer", file=sys.stderr)
        return 1
    facts = examine()
    print(json.dumps(facts, indent=2) if options.json else show(facts))
    return 0 if facts["runs_on"] else 1


if __name__ == "__main__":
    sys.exit(main())
