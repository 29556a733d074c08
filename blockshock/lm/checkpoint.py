"""What a language model's checkpoint holds, and which model and tokenizer it fits.

    format     FORMAT
    step       steps done;  position: sequences read by all ranks;  seconds: of training
    model      the whole state_dict of the module, float32
    optimizer  the whole state by the parameters' names: no method and no number of ranks shows
    rng        of each rank: {"cpu", "cuda"}
    config     all settings;  tokenizer: the digest of its own

The learning rate is a function of the step, and the data of the position, so nothing else is state.
"""

from pathlib import Path
from typing import Any

from blockshock.lm.config import Refused
from blockshock.runs import checkpoint as saving
from blockshock.runs.checkpoint import NAME, restore_rng, rng_state
from blockshock.transformer.sync import plan

__all__ = ["NAME", "fits", "load", "restore_rng", "rng_state", "save"]

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` in place of what is there. Raises Refused on a full disk; the old stays."""
    saving.save(path, state, FORMAT)


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. path: the file, or the folder of its run.

    Raises:
        Refused: none there, no checkpoint of this program, or one of another format.
    """
    return saving.load(path, FORMAT, "blockshock.lm")


def fits(
    state: dict[str, Any],
    model: dict[str, Any],
    vocabulary: int,
    digest: str,
    *,
    goes_on: bool = True,
) -> None:
    """Compares a checkpoint with the model and the tokenizer that are asked for.

    model: the section of the config. goes_on: whether the model must compute what was trained, and
    not only begin with its weights. Raises Refused where they differ.
    """
    saved = {**state["config"]["model"], "vocabulary": state["config"]["data"]["vocabulary"]}
    wanted = {**model, "vocabulary": vocabulary}
    free = {"attention", "linear", "sync", "tensor_parallel"}  # other ways to compute the same
    other = [
        f"{key} = {saved.get(key)}, here {wanted[key]}"
        for key in wanted
        if key not in free and saved.get(key) != wanted[key]
    ]
    if other:
        raise Refused(
            f"the checkpoint is of another model: {'; '.join(other)}. Set these as they were, or "
            "begin a new run"
        )
    (computed, was), (here, words) = _computed(saved), _computed(model)
    if goes_on and computed != here:
        raise Refused(
            f"the checkpoint was trained as {was}, here it would be {words}: that computes "
            "something else from the same weights. Set model.sync and model.tensor_parallel as "
            "they were, or begin a new run (--init-from)"
        )
    if state["tokenizer"] != digest:
        raise Refused(
            f"the checkpoint was trained with tokenizer {state['tokenizer']}, and data.folder "
            f"holds {digest}: its tokens mean something else. Use the folder that it was trained on"
        )


def _computed(model: dict[str, Any]) -> tuple[tuple, str]:
    """What a section of a config makes of weights, and in words.

    With fewer syncs it depends on the ranks. A plan may have several names.
    """
    name, ranks = model.get("sync"), model.get("tensor_parallel", 1)
    made = plan(name or "tp", model["depth"])
    if made.dense:
        return (), "the dense model"
    words = f"plan {name} on {ranks} tensor-parallel ranks"
    return (made.kind, made.groups, ranks), words
