"""Accuracies of trained models as a result file that every tool reads.

    python -m tools.families.block_sparse.study RUN... --out FILE

RUN is the folder of a run of `blockshock.block_sparse` that was trained to its end and evaluated.
Each becomes one or two cases of phase `study`: `dense` where nothing was pruned, else `supermask`,
whose masks are folded into dense layers, and the storage that `evaluate` converted them to.
Samples are seconds a step, one for each row of the log. Runs that differ in more than sparsity and
seed have another `recipe`.
"""

import json
from pathlib import Path
from typing import Any

from tools import runs
from tools.compact import compacted
from tools.curves import number, read_rows
from tools.files import ToolError, parser, run, save
from tools.results import SCHEMA

# Settings that change no accuracy, and those that runs may differ in.
NO_RECIPE = ("run", "device", "log", "use")
NO_RECIPE_OF = {
    "data": ("workers",),
    "train": ("seed", "checkpoint_every", "evaluate_every"),
    "sparse": ("linear",),
}
SIZES = ("width", "depth", "heads", "patch", "image")
DTYPES = {"float32": "fp32", "bf16": "bf16"}


def entries(folder: Path) -> list[dict]:
    """Elements of "benchmarks": one of a dense run, two of a pruned one."""
    config, found = runs.settings(folder, ("data", "model", "sparse", "train")), _evaluation(folder)
    train, steps = config["train"], config["train"]["steps"]
    if found["step"] != steps:
        raise ToolError(
            f"{folder} was evaluated at step {found['step']} of {steps}: train it to its end "
            "(--resume) and evaluate it again, or leave it out"
        )
    log = folder / "log.csv"
    rows = read_rows(log)
    images = train["batch"] * train["accumulate"] * found["machine"]["ranks"]
    case = _case(folder, config, found)
    dense = not case["sparsity"]
    kinds = {"dense": "folded"} if dense else {"supermask": "folded", found["storage"]: "converted"}
    made = []
    for method, kind in kinds.items():
        own = {**case, "method": method}
        rates = {name: found[kind][name] for name in ("top1", "top5", "loss")}
        rates |= {"apart": found["apart"]} if kind == "converted" else {}
        name = _name(own)
        info = {
            "schema": SCHEMA,
            "id": f"block_sparse_study/{name}",
            "case": own,
            "device": found["machine"]["kind"],
            "timing": {"mode": f"log of {found['machine']['device']}"},
            "curves": {
                "step": [number(row, "step", log) for row in rows],
                "loss": [number(row, "loss", log) for row in rows],
            },
            "rates": rates,
        }
        seconds = {"data": [images / number(row, "images_per_s", log) for row in rows]}
        entry = {"name": f"study[{name}]", "group": "study", "stats": seconds, "extra_info": info}
        made.append(entry)
    return made


def gathered(folders: list[Path]) -> dict:
    """The result file of some runs.

    Raises ToolError for a run that is not finished, two of the same case, and two machines.
    """
    records = [_evaluation(folder) for folder in folders]
    machine, seen, benchmarks = records[0]["machine"], {}, []
    for folder, record in zip(folders, records, strict=True):
        if record["machine"]["device"] != machine["device"]:
            raise ToolError(
                f"{folders[0]} was evaluated on {machine['device']}, {folder} on "
                f"{record['machine']['device']}: evaluate them on one kind"
            )
        for made in entries(folder):
            other = seen.setdefault(made["extra_info"]["id"], folder)
            if other is not folder:
                raise ToolError(f"{other} and {folder} are of one sparsity, recipe and seed")
            benchmarks.append(made)
    commits = [record["commit_info"] for record in records]
    return runs.content(machine, commits, folders, benchmarks)


def _evaluation(folder: Path) -> dict[str, Any]:
    """What `evaluate` wrote."""
    path = folder / "evaluation.json"
    if not path.exists():
        raise ToolError(f"{folder} has no evaluation.json: run its `evaluate` first")
    found = runs.read_json(path)
    kinds = {"step": int, "storage": str, "dtype": str, "folded": dict, "converted": dict}
    runs.check_keys(
        path, found, kinds | {"apart": float, "machine": dict, "commit_info": dict | None}
    )
    for kind in ("folded", "converted"):
        runs.check_keys(path, found[kind], {"top1": float, "top5": float, "loss": float})
    runs.check_keys(path, found["machine"], {"device": str, "kind": str, "ranks": int})
    return found


def _case(folder: Path, config: dict, found: dict) -> dict:
    """What both cases of a run share."""
    train, sparse = config["train"], config["sparse"]
    sizes = config["model"] | found.get("sizes", {})  # those of model.shape stand nowhere else
    runs.check_keys(folder / "evaluation.json", sizes, dict.fromkeys(SIZES, int))
    width = sizes["width"]
    return {
        "family": "block_sparse",
        "phase": "study",
        "N": sizes["hidden"] or 4 * width,
        "K": width,
        "B": train["batch"],
        "block": sparse["block"],
        "sparsity": sparse["linear"],
        **{name: sizes[name] for name in SIZES if name != "width"},
        "shape": config["data"]["source"] if config["data"]["source"] == "digits" else None,
        "steps": train["steps"],
        "dtype": DTYPES[found["dtype"]],
        "seed": train["seed"],
        "ranks": found["machine"]["ranks"],
        "recipe": runs.recipe(config, NO_RECIPE, NO_RECIPE_OF),
    }


def _name(case: dict) -> str:
    """bsr-64x4-B64-b16-s0.8-steps1000-1a2b3c4d-seed=0."""
    sizes = f"{case['K']}x{case['depth']}-B{case['B']}-b{case['block']}-s{case['sparsity']:g}"
    return f"{case['method']}-{sizes}-steps{case['steps']}-{case['recipe']}-seed={case['seed']}"


def main(argv: list[str]) -> int:
    command = parser("families.block_sparse.study", __doc__, "folders of evaluated runs")
    command.add_argument("-o", "--out", required=True, metavar="FILE", help="the result file")
    options = command.parse_args(argv)
    content = gathered([Path(folder) for folder in options.files])
    save(options.out, compacted(json.dumps(content)))
    print(f"{options.out} has {len(content['benchmarks'])} cases of {len(options.files)} runs")
    return 0


if __name__ == "__main__":
    run(main)
