"""What a rule reads besides its indices, so that what was made of it is known to be still right.

    tensor                its identity and version: every write in place raises the version
    function              its closure, its defaults, and the globals that it names
    other object          the attributes that one of these functions names
    list, tuple, dict, set, partial    what they hold
    number, string, dtype, ...         its value
    anything else         its identity

Not noticed: writes through `.data`, NumPy or another process, and the contents of objects of other
libraries. Tensors made in inference mode have no version: what is made of them is never kept.
"""

import functools
import sys
import types
from collections import deque
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
)
OTHERS = {"torch", "numpy", *sys.stdlib_module_names}  # libraries whose functions are not followed


class Count:
    """How often a pattern was renewed."""

    def __init__(self):
        self.number = 0


class _Same:
    """Equal to another of the same object, as long as that lives; does not keep it alive."""

    def __init__(self, thing):
        try:
            self.to = ref(thing)
        except TypeError:
            self.to = lambda: thing

    def __eq__(self, other):
        thing = self.to()
        return isinstance(other, _Same) and thing is not None and thing is other.to()

    __hash__ = None


_KEPT: WeakKeyDictionary = WeakKeyDictionary()  # pattern -> (what it read, what was made of it)


def kept(pattern) -> dict:
    """What was made of a pattern, by names of the makers' choice.

    Empty again as soon as anything that its rule reads is another, or `renew` was called.
    """
    now = state(pattern.depends_on)
    found = _KEPT.get(pattern)
    if found is None or found[0] != now:
        found = _KEPT[pattern] = now, {}
    return found[1]


def version(tensor: Tensor):
    """A number that every write in place raises; of a tensor of inference mode, equal to none."""
    return object() if tensor.is_inference() else tensor._version


def state(things: tuple) -> list:
    """What these read, in a form that can be compared."""
    found, objects, names = [], {}, {}  # dicts keep the order
    queue, met, looked = deque(things), {}, set()  # met keeps all alive: no id is used twice
    while queue:
        thing = queue.popleft()
        if isinstance(thing, PLAIN):
            found.append((type(thing), thing))
        elif isinstance(thing, Count):
            found.append(thing.number)
        elif isinstance(thing, list | tuple | set | frozenset | dict):
            found.append((type(thing), len(thing)))
            if id(thing) not in met:
                met[id(thing)] = thing
                queue.extend(thing)
                queue.extend(thing.values() if isinstance(thing, dict) else ())
        elif isinstance(thing, types.MethodType):  # made anew by each look-up
            queue.extend((thing.__func__, thing.__self__))
        elif not isinstance(thing, BUILT_IN):
            found.append(_Same(thing))
            if isinstance(thing, Tensor):
                found.append(version(thing))
            elif id(thing) not in met:
                met[id(thing)] = thing
                _follow(thing, queue, objects, names)
        if not queue:
            _look(queue, objects, names, looked)
    return found


def _follow(thing, queue: deque, objects: dict, names: dict) -> None:
    """Queues what an object holds; notes the names that a function may look up in objects."""
    if isinstance(thing, functools.partial):
        queue.extend((thing.func, thing.args, thing.keywords))
    elif isinstance(thing, types.FunctionType):
        if (thing.__module__ or "").partition(".")[0] in OTHERS:
            return
        queue.extend((thing.__defaults__, thing.__kwdefaults__))
        queue.extend(cell.cell_contents for cell in thing.__closure__ or () if _filled(cell))
        for name in _names(thing.__code__):
            names[name] = None
            if name in thing.__globals__:
                queue.append(thing.__globals__[name])
    elif not isinstance(thing, type):
        objects[id(thing)] = thing
        name = "forward" if isinstance(thing, torch.nn.Module) else "__call__"
        queue.append(getattr(type(thing), name, None))


def _look(queue: deque, objects: dict, names: dict, looked: set) -> None:
    """Queues the attributes that any of the functions names."""
    for thing in objects.values():
        for name in names:
            if (id(thing), name) in looked:
                continue
            looked.add((id(thing), name))
            of_type = getattr(type(thing), name, None)
            if isinstance(of_type, property):
                queue.append(of_type.fget)
            elif hasattr(thing, name):
                queue.append(getattr(thing, name))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Globals and attributes that a function and those defined in it name."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return tuple(dict.fromkeys((*code.co_names, *(name for some in inner for name in some))))


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty cell raises
    except ValueError:
        return False
    return True
