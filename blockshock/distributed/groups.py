"""What is kept for a process group goes with it.

`kept = ByGroup(dict)` holds a dict for each group, `kept.of(group)`, made at first use. The group
is held weakly: once it was destroyed and nobody else refers to it, its entry is gone, and no later
group, even at the same address, finds it.
"""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

T = TypeVar("T")


class _Alone:
    """Stands for the group of a process without process groups."""


_ALONE = _Alone()


def itself(group=None):
    """The group: None would name another one after the default group was made anew."""
    if group is not None:
        return group
    return dist.group.WORLD if dist.is_initialized() else _ALONE


def exists(group) -> bool:
    """Whether a group was not destroyed."""
    if group is _ALONE:
        return not dist.is_initialized()
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):  # the group is gone, or all of them are
        return False
    return True


class ByGroup(Generic[T]):
    """One value a group; None is the default group. make: makes a value, without arguments."""

    def __init__(self, make: Callable[[], T]):
        self._make, self._values = make, WeakKeyDictionary()

    def of(self, group=None) -> T:
        """The group's value."""
        group = itself(group)
        found = self._values.get(group)
        return self._values.setdefault(group, self._make()) if found is None else found

    def all(self) -> list[T]:
        """The values of all groups."""
        return list(self._values.values())

    def items(self) -> list[tuple[object, T]]:
        """(group, its value), for all groups."""
        return list(self._values.items())

    def clear(self) -> None:
        """Forgets all of them."""
        self._values.clear()

    def drop_destroyed(self) -> None:
        """Forgets the values of groups that were destroyed, though somebody refers to them."""
        for group in [group for group in self._values if not exists(group)]:
            self._values.pop(group, None)
