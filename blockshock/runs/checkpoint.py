"""A checkpoint is one file, `<run>/checkpoint.pt`: always the last one that was written whole.

Loading it with `weights_only`, a checkpoint from a stranger runs no code.
"""

from pathlib import Path
from typing import Any

import torch

from blockshock.runs.files import written_whole
from blockshock.runs.ranks import Ranks
from blockshock.runs.settings import Refused

NAME = "checkpoint.pt"


def save(path: Path, state: dict[str, Any], version: int | str) -> None:
    """Writes `state` in place of what is there. Raises Refused on a full disk; the old stays.

    version: of the program's states, under "format".
    """
    with written_whole(path) as out:
        torch.save({"format": version, **state}, out)


def load(path: Path, version: int | str, program: str) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. path: the file, or the folder of its run.

    Raises:
        Refused: none there, no checkpoint of this program, or one of another version.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise Refused(f"{file}: no checkpoint there; train first, or name the run's folder")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:  # of a torn file the unpickler raises anything
        raise Refused(f"{file}: no checkpoint of {program} ({str(error)[:200]})") from error
    if found != version:
        raise Refused(f"{file}: format {found}, and this version reads {version}; train anew")
    return state


def where_from(run: str, resume: bool, init_from: str | None) -> Path | None:
    """The checkpoint that training begins with, or None for none.

    Raises:
        Refused: both are asked for; the run has a checkpoint and is not resumed.
    """
    file = Path(run) / NAME
    if resume and init_from:
        raise Refused("--resume and --init-from: a run goes on, or begins with other weights")
    if not resume and file.exists():
        raise Refused(
            f"{file} is there: --resume goes on from it; for a new run choose another folder "
            "(--set run=FOLDER), or delete this one"
        )
    if resume:
        return file
    return Path(init_from) if init_from else None


def rng_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    """Of this rank's generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(states: list[dict], ranks: Ranks) -> bool:
    """Sets this rank's generators; False, and nothing is set, where the run had other ranks."""
    if len(states) != ranks.size:
        return False
    mine = states[ranks.rank]
    torch.set_rng_state(mine["cpu"])
    if mine["cuda"] is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], ranks.device)
    return True
