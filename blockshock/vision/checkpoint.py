"""What a vision run's checkpoint holds, and which settings it fits.

    format     FORMAT
    step       steps done;  position: images read by all ranks;  seconds: of training
    model      the whole state_dict of the module under its masks, float32
    average    likewise, of the averaged weights; None where none are kept
    optimizer  the whole state by the parameters' names: no method and no number of ranks shows
    rng        of each rank: {"cpu", "cuda"}
    config     all settings

Learning rate and sparsity are functions of the step, and the data of the position, so nothing else
is state.
"""

from pathlib import Path
from typing import Any

from blockshock.runs import checkpoint as saving
from blockshock.runs.checkpoint import NAME, restore_rng, rng_state
from blockshock.runs.settings import Refused

__all__ = ["NAME", "fits", "load", "restore_rng", "rng_state", "save"]

FORMAT = "vision 1"
FREE = {"attention"}  # another way to compute the same
MASKS = ("block", "skip", "linear", "conv1x1", "conv")  # of the section `sparse`


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` in place of what is there. Raises Refused on a full disk; the old stays."""
    saving.save(path, state, FORMAT)


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. path: the file, or the folder of its run.

    Raises:
        Refused: none there, no checkpoint of this program, or one of another format.
    """
    return saving.load(path, FORMAT, "blockshock.block_sparse")


def fits(state: dict[str, Any], config: dict[str, Any], *, masks: bool = True) -> None:
    """Compares a checkpoint with the settings, nested dicts, that are asked for.

    masks: whether the supermasks must be the same too. Raises Refused where something differs.
    """
    wanted = [("model", key) for key in config["model"] if key not in FREE]
    if masks:
        wanted += [("sparse", key) for key in MASKS]
    saved = state["config"]
    other = [
        f"{section}.{key} = {saved[section].get(key)}, here {config[section][key]}"
        for section, key in wanted
        if saved[section].get(key) != config[section][key]
    ]
    if other:
        raise Refused(
            f"the checkpoint is of another model: {'; '.join(other)}. Set these as they were, or "
            "begin a new run"
        )
