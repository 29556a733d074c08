"""Training runs under sync plans, as a result file that every tool reads.

    python -m tools.families.transformer.study RUN... --out FILE

RUN is the folder of a finished run of `blockshock.lm`. Each becomes a case of phase `study`: its
samples are seconds a step, one for each row of the log; `curves` has the losses. Runs that differ
in more than plan and seed have another `recipe`, and no tool compares them. A run whose settings do
not say all of its course is refused: one with --init-from or --skip-data, or resumed with other
settings or ranks. Losses may come from several kinds of machine, but speeds are those of the first
run's: a run that was somewhere else as well has none, and `timing` says where it was. Runs that
shared a machine slow each other down: with --shared none has a speed.
"""

import json
from pathlib import Path
from statistics import median

from tools import runs
from tools.compact import compacted
from tools.curves import number, read_rows
from tools.families.transformer.points import rule
from tools.files import ToolError, parser, run, save
from tools.results import SCHEMA

# Settings that change neither the losses of a run nor its speed, and those that runs may differ in.
NO_RECIPE = ("run", "device", "log", "sample")
NO_RECIPE_OF = {
    "data": ("folder",),
    "train": ("seed", "checkpoint_every"),
    "model": ("sync",),
}


def entry(folder: Path, device: str | None = None, *, shared: bool = False) -> dict:
    """One element of "benchmarks".

    device: whose speeds are kept; None: of any. shared: no speed is, as other runs were beside it.
    """
    record, config = _record(folder), runs.settings(folder, ("data", "model", "train"))
    log = folder / "log.csv"
    rows = read_rows(log)
    plan, train, sizes = record["plan"], config["train"], config["model"]
    ended = number(rows[-1], "step", log)
    if ended < train["steps"]:
        raise ToolError(
            f"{folder} ended at step {ended:.0f} of {train['steps']}: train it to its end "
            "(--resume), or leave it out"
        )
    measured = [row for row in rows if row.get("val_loss")]
    if not measured or measured[-1] is not rows[-1]:
        raise ToolError(f"{log} has no val_loss at the last step: it is not comparable")
    _check_starts(folder, record["starts"])
    tokens = number(rows[-1], "tokens", log) / ended
    rates = [number(row, "tokens_per_s", log) for row in rows]
    machine = record["starts"][-1]["machine"]
    devices = dict.fromkeys(start["machine"]["device"] for start in record["starts"])
    case = {
        "family": "transformer",
        "phase": "study",
        "method": _rule(plan, sizes["depth"]),
        **{name: sizes[name] for name in ("width", "depth", "heads")},
        "vocabulary": config["data"]["vocabulary"],
        "batch": round(tokens / sizes["context"]),
        "T": sizes["context"],
        "steps": train["steps"],
        "dtype": "bf16" if train["autocast"] == "bf16" else "fp32",
        "compiled": train["compile"],
        "checkpointed": train["checkpoint_blocks"],
        "reduce": "collective",
        "seed": train["seed"],
        "ranks": machine["ranks"],
        "tensor_ranks": sizes["tensor_parallel"],
        "recipe": runs.recipe(config, NO_RECIPE, NO_RECIPE_OF, record["tokenizer"]),
    }
    timed = not shared and (device is None or [*devices] == [device])
    speed = {"tokens_per_s": median(rates)} if timed else {}
    beside = ", beside other runs" * shared
    name = _name(case)
    info = {
        "schema": SCHEMA,
        "id": f"transformer_study/{name}",
        "usual": {"reduce": "collective"},
        "case": case,
        "device": machine["kind"],
        "timing": {"mode": f"log of {', '.join(devices)}{beside}"},
        "curves": {
            "step": [number(row, "step", log) for row in rows],
            "loss": [number(row, "loss", log) for row in rows],
            "val_step": [number(row, "step", log) for row in measured],
            "val_loss": [number(row, "val_loss", log) for row in measured],
        },
        "memory": {"peak_bytes": max(number(row, "memory_mib", log) for row in rows) * 2**20},
        "rates": {
            "syncs": plan["syncs"],
            "loss": number(rows[-1], "loss", log),
            "val_loss": number(rows[-1], "val_loss", log),
            **speed,
        },
    }
    samples = {"data": [tokens / rate for rate in rates]}
    return {"name": f"study[{name}]", "group": "study", "stats": samples, "extra_info": info}


def gathered(folders: list[Path], *, shared: bool = False) -> dict:
    """The result file of some runs. shared: they ran beside each other on one machine.

    Raises ToolError for a run that is not finished, and two of the same case.
    """
    starts = {folder: _record(folder)["starts"] for folder in folders}
    machine = starts[folders[0]][-1]["machine"]
    found: dict[str, tuple[Path, dict]] = {}
    for folder in folders:
        made = entry(folder, machine["device"], shared=shared)
        other, _ = found.setdefault(made["extra_info"]["id"], (folder, made))
        if other is not folder:
            raise ToolError(f"{other} and {folder} are of one plan, recipe and seed: leave one out")
    commits = [start["commit_info"] for each in starts.values() for start in each]
    return runs.content(machine, commits, folders, [made for _, made in found.values()])


def _check_starts(folder: Path, starts: list[dict]) -> None:
    """Raises ToolError for a run whose losses are not those of its settings alone."""
    why = [f"--{key.replace('_', '-')}" for key in ("init_from", "skip_data") if _any(starts, key)]
    changed = {key: was for start in starts for key, was in start.get("changed", {}).items()}
    why += [f"{key} = {was} before it was resumed" for key, was in changed.items() if _counts(key)]
    ranks = list(dict.fromkeys(start["machine"]["ranks"] for start in starts))
    if len(ranks) > 1:
        why.append(f"{' and then '.join(map(str, ranks))} ranks")
    if why:
        raise ToolError(
            f"{folder} was trained with {', '.join(why)}: other runs were not, and its settings do "
            "not say so; leave it out"
        )


def _any(starts: list[dict], key: str) -> bool:
    return any(start.get(key) for start in starts)


def _counts(key: str) -> bool:
    """Whether a setting decides the losses: what is in the recipe, and the seed."""
    section, _, name = key.partition(".")
    return section not in NO_RECIPE and (
        key == "train.seed" or name not in NO_RECIPE_OF.get(section, ())
    )


def _record(folder: Path) -> dict:
    """What the run wrote about itself."""
    path = folder / "run.json"
    record = runs.read_json(path)
    runs.check_keys(path, record, {"plan": dict | None, "tokenizer": str, "starts": list})
    if not record["plan"]:
        raise ToolError(f"{path} names no plan: {folder} was not trained with --sync")
    runs.check_keys(path, record["plan"], {"name": str, "kind": str, "syncs": int})
    for start in record["starts"] or [None]:
        runs.check_keys(path, start, {"machine": dict, "commit_info": dict | None})
        runs.check_keys(path, start["machine"], {"device": str, "kind": str, "ranks": int})
    return record


def _rule(plan: dict, depth: int) -> str:
    """The rule of a plan as the laboratory names it; of one that follows none, its own name."""
    if plan["kind"] != "group":
        return plan["kind"] if plan["syncs"] == depth else plan["name"]
    named = plan["name"].startswith("selective")
    return plan["name"] if named else rule(plan["syncs"], depth)


def _name(case: dict) -> str:
    """tp-768x12-B128-T1024-bf16-steps1000-1a2b3c4d-seed=0."""
    sizes = f"{case['width']}x{case['depth']}-B{case['batch']}-T{case['T']}-{case['dtype']}"
    return f"{case['method']}-{sizes}-steps{case['steps']}-{case['recipe']}-seed={case['seed']}"


def main(argv: list[str]) -> int:
    command = parser("families.transformer.study", __doc__, "folders of finished runs")
    command.add_argument("-o", "--out", required=True, metavar="FILE", help="the result file")
    command.add_argument(
        "--shared",
        action="store_true",
        help="the runs ran beside each other on one machine: their speeds are left out",
    )
    options = command.parse_args(argv)
    content = gathered([Path(folder) for folder in options.files], shared=options.shared)
    save(options.out, compacted(json.dumps(content)))
    found = content["benchmarks"]
    slow = sum("tokens_per_s" not in made["extra_info"]["rates"] for made in found)
    device = content["machine_info"]["blockshock"]["device"]
    why = "beside other runs" if options.shared else f"not on {device} alone"
    told = f", {slow} of them without a speed: {why}" if slow else ""
    print(f"{options.out} has {len(found)} run{'s' * (len(found) != 1)}{told}")
    return 0


if __name__ == "__main__":
    run(main)
