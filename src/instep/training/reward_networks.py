"""The networks that rewards and monitors hold, so that they can come to the device with the run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

# levels below a reward at which networks are looked for: a list of rewards, a reward, its function, that function's object, a dictionary of it ...
DEPTH = 8
PLAIN = (type, ModuleType, BuiltinFunctionType, torch.Tensor, torch.device, torch.dtype, str, bytes, int, float, complex, type(None))


def modules_in(*objects: Any) -> list[nn.Module]:
    """The networks that objects hold, each once: in attributes, slots, lists, tuples, sets, mappings, bound methods, `functools.partial`, and in functions
    as defaults, in closures, and as global variables that the function names.

    Parts of a network that was found are not listed again. A network that a function imports, or makes when it is called, cannot be found.
    """
    found: dict[int, nn.Module] = {}
    level, seen, kept = list(objects), {id(each) for each in objects}, list(objects)
    for _ in range(DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, nn.Module):
                found[id(each)] = each
                continue
            for inner in _inside(each):
                if not isinstance(inner, PLAIN) and id(inner) not in seen:
                    seen.add(id(inner))
                    below.append(inner)
        # an object made on the way keeps its id as long as it lives
        kept += below
        level = below
    return list(found.values())


def _inside(given: Any) -> Iterable[Any]:
    """What an object holds, one level down."""
    if isinstance(given, Mapping):
        return [*given.values(), *given.keys()]
    if isinstance(given, list | tuple | set | frozenset):
        return list(given)
    if isinstance(given, functools.partial):
        return [given.func, *given.args, *given.keywords.values()]
    if isinstance(given, MethodType):
        return [given.__self__, given.__func__]
    if isinstance(given, FunctionType):
        # of the global variables networks alone, and not what they lead to: a script's are all that it works on
        shared = [value for name in given.__code__.co_names if isinstance(value := given.__globals__.get(name), nn.Module)]
        defaults = [*(given.__defaults__ or ()), *(given.__kwdefaults__ or {}).values()]
        return [*_filled(given.__closure__ or ()), *defaults, *shared, *vars(given).values()]
    slots = [slot for kind in type(given).__mro__ for slot in _names(getattr(kind, "__slots__", ()))]
    return [*(vars(given).values() if hasattr(given, "__dict__") else ()), *(getattr(given, slot) for slot in slots if hasattr(given, slot))]


def _filled(cells: Iterable[CellType]) -> Iterable[Any]:
    """The contents of a closure's cells; one whose variable was not assigned yet has none."""
    for cell in cells:
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots
