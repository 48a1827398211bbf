"""Which attributes the code of a model's classes reads, told from its bytecode: no source is needed."""

from __future__ import annotations

__all__ = ["ANY_NAME", "CONTAINERS", "codes_of", "codes_that_run", "is_never_read", "is_of_torch", "names_in"]

import types
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from torch import nn

_BUILDERS = ("init", "reset", "extra_repr", "flops", "no_weight_decay")
"""Methods with these words in their names set modules up; that they name an attribute does not read it."""
ANY_NAME = frozenset(
    ("getattr", "children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "__dict__", "__getattr__")
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_never_read(model: nn.Module, parameter: str, roots: tuple[nn.Module, ...] = ()) -> bool:
    """Whether no code of the model's classes could read the module (or the bare parameter) that `parameter` belongs to.

    Args:
        model: the model.
        parameter: name as in `model.named_parameters()`.
        roots: further modules whose code may reach into the model, such as the LightningModule around it.
    """
    path = parameter.split(".")
    names = _names_read(model, roots)
    for depth in range(len(path)):
        holder = model.get_submodule(".".join(path[:depth]))
        if isinstance(holder, CONTAINERS):
            continue
        if is_of_torch(type(holder)):
            return False  # torch's own layers read what they register
        if path[depth] not in names and not _names_of(type(holder)) & ANY_NAME:
            return True
    return False


def is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn")


def _names_read(model: nn.Module, roots: tuple[nn.Module, ...]) -> set[str]:
    kinds = {type(module) for root in (model, *roots) for module in root.modules()}
    return {name for kind in kinds for name in _names_of(kind)}


def _names_of(kind: type) -> set[str]:
    """Every attribute, global and string constant that the methods of a class name, its builders left out."""
    return {name for _, code in codes_of(kind) for name in names_in(code)}


def codes_of(kind: type) -> Iterator[tuple[str, types.CodeType]]:
    """The code of a class's methods and of those it inherits from other users' classes, by name; its builders left out."""
    yield from ((name, code) for _, name, code in _definitions(kind))


def _definitions(kind: type) -> Iterator[tuple[type, str, types.CodeType]]:
    """The same with the class that defines each, as a call would look them up."""
    for base in kind.__mro__:
        if base in (nn.Module, object) or is_of_torch(base) or base.__module__.startswith(("lightning.", "pytorch_lightning.")):
            continue
        for method, value in vars(base).items():
            if not any(word in method for word in _BUILDERS):
                yield from ((base, method, code) for code in _codes(value))


def codes_that_run(kinds: Iterable[type], callers: Collection[type] = ()) -> set[types.CodeType]:
    """The code of methods that a forward of `kinds` can reach by their names, and all that `callers` define or reach.

    An overridden method counts where some code says `super`.
    """
    first: dict[str, set[types.CodeType]] = defaultdict(set)
    overridden: dict[str, set[types.CodeType]] = defaultdict(set)
    for kind in kinds:
        owner: dict[str, type] = {}
        for base, name, code in _definitions(kind):
            (first if owner.setdefault(name, base) is base else overridden)[name].add(code)
    waiting = [*first["forward"], *(code for kind in callers for _, code in codes_of(kind))]
    found: set[types.CodeType] = set()
    while waiting:
        code = waiting.pop()
        if code not in found:
            found.add(code)
            names = set(names_in(code))
            waiting += [called for name in names for called in first.get(name, ())]
            waiting += [called for name in names for called in overridden.get(name, ()) if "super" in names]
    return found


def _codes(value: object) -> Iterator[types.CodeType]:
    if isinstance(value, property):
        for function in (value.fget, value.fset):
            yield from _codes(function)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _codes(value.__func__)
    else:
        seen: set[int] = set()
        while value is not None and id(value) not in seen:  # decorators that name what they wrap
            seen.add(id(value))
            code = getattr(value, "__code__", None)
            if isinstance(code, types.CodeType):
                yield code
            value = getattr(value, "__wrapped__", None)


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
        elif isinstance(constant, str):
            yield constant
