"""What the ranks of a group tell each other before they go on, by the process group's store.

No device takes part, and the wait has an end: a rank that does not come is an error, and no hang.

The store counts the turns, not the ranks: a rank may be of a new process, and a group may have the
name of one that was destroyed. In a turn every rank draws a number before any of them goes on, so
the numbers of a turn are those of one run of the group's size.
"""

from datetime import timedelta

import torch.distributed as dist

from blockshock.distributed import collectives

SECONDS = 60.0


def told_by_all(text: str, group=None, *, about: str, seconds: float = SECONDS) -> list[str]:
    """What each rank of the group says, in the group's order. Every rank must call it.

    Raises RuntimeError, which names `about`, where a rank has not called it after so many seconds.
    """
    ranks = collectives.group_size(group)
    if ranks == 1:
        return [text]
    store, own = dist.distributed_c10d._get_default_store(), collectives.group_rank(group)
    name = f"blockshock/{_name(group)}/{ranks}"
    turn = (store.add(name, 1) - 1) // ranks
    keys = [f"{name}/{turn}/{rank}" for rank in range(ranks)]
    store.set(keys[own], text)
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:  # of every store; a FileStore's is no DistError
        store.delete_key(keys[own])  # whoever comes late must not take it for a later turn's
        store.add(name, -1)
        raise RuntimeError(
            f"{about} is a step of all {ranks} ranks of the group, and one of them has not come "
            f"within {seconds:.0f} s; call it on every rank"
        ) from error
    if turn > 1:  # whoever has answered this turn has read the one before
        store.delete_key(f"{name}/{turn - 2}/{own}")
    return [store.get(key).decode() for key in keys]


def _name(group) -> str:
    return (group or dist.group.WORLD).group_name
