"""How a model is edited: the only place that mutates a module tree.

A fix builds a list of edits and hands them to `apply_edits`, which checks all of them before it makes the first. Every edit
keeps the existing state_dict keys and parameter objects, and `Changes.undo()` puts back the very objects that were there.
"""

from __future__ import annotations

__all__ = [
    "Attach",
    "AttachAfter",
    "Change",
    "Changes",
    "Edit",
    "Filter",
    "Insert",
    "MixIn",
    "PostHook",
    "PreHook",
    "Remove",
    "Replace",
    "SetAttributes",
    "Undo",
    "apply_edits",
    "get_module",
    "path_of",
]

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from pl_normkit.changes import Change, Changes, Undo
from pl_normkit.errors import EditError, nearest
from pl_normkit.wrappers import unwrapped

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Forward pre-hook: (module, positional, keyword arguments) -> the arguments its forward gets."""

PostHook = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any]
"""Forward hook: (module, positional, keyword arguments, output) -> the output its callers get."""

Filter = Callable[[nn.Module, str], bool]
"""Called with (module, path), says whether a fix may act there."""

_ABSENT = object()


class Edit(Protocol):
    """One thing to change. `check` raises EditError and touches nothing; `is_done` says the model already is so."""

    def check(self, model: nn.Module) -> None: ...

    def is_done(self, model: nn.Module) -> bool: ...

    def apply(self, model: nn.Module) -> tuple[Change, Undo]: ...


def apply_edits(model: nn.Module, edits: Sequence[Edit], skipped: Sequence[Change] = ()) -> Changes:
    """Check every edit, then make those that are not made yet.

    A model that is compiled or wrapped for several devices is edited through to the original.

    Raises EditError before anything is touched when one of them cannot be made; whatever an edit raises while being
    made, the edits before it are taken back first.
    """
    model = unwrapped(model)
    for edit in edits:
        edit.check(model)
    changes = Changes(skipped=list(skipped))
    try:
        for edit in edits:
            if not edit.is_done(model):
                edit.check(model)  # an earlier edit of this list may stand in its way
                change, undo = edit.apply(model)
                changes.made.append(change)
                changes._undo.append(undo)
    except BaseException:
        changes.undo()
        raise
    return changes


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`. Raises EditError naming the nearest path."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in model.named_modules()]
        raise EditError(f"the model has no module {path!r}", fix=nearest(path, names) or "see model.named_modules()") from error


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The first path of `module` in `model`, "" where it is the model itself or no part of it."""
    return next((name for name, found in model.named_modules() if found is module), "")


def _paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    return [name for name, found in model.named_modules(remove_duplicate=False) if found is module]


@dataclass(frozen=True)
class Replace:
    """Put `new` where the module at `path` stands, everywhere the model holds that module.

    `new` must have the state_dict keys of the old one, but for those named in `may_differ`, which a conversion drops or adds. Training
    mode and, for modules without parameters, nothing else is carried over: `new` arrives complete.
    """

    path: str
    new: nn.Module
    what: str
    may_differ: Collection[str] = ()

    def check(self, model: nn.Module) -> None:
        if not self.path:
            raise EditError("the model itself cannot be replaced", fix="wrap it in a module of your own")
        old = get_module(model, self.path)
        missing = (set(old.state_dict()) ^ set(self.new.state_dict())) - set(self.may_differ)
        if missing and not self.is_done(model):
            raise EditError("a replacement must keep the state_dict keys", where=self.path, evidence=", ".join(sorted(missing)))

    def is_done(self, model: nn.Module) -> bool:
        return get_module(model, self.path) is self.new

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        old = get_module(model, self.path)
        paths = _paths_of(model, old)
        mode = old.training
        self.new.train(mode)
        _put(model, paths, self.new)

        def undo() -> None:
            if self.new.training is not mode:  # the model changed its mode meanwhile
                old.train(self.new.training)
            _put(model, paths, old)

        return Change(self.path, self.what), undo


def _put(model: nn.Module, paths: Sequence[str], module: nn.Module) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module


@dataclass(frozen=True)
class Insert:
    """Let `new` act on the first argument, positional or keyword (`where="before"`), or on the output (`where="after"`) of
    the module at `path`.

    `new` becomes the child `name` of that module, so it follows train/eval, device moves, copies and pickling; a child
    with buffers or parameters adds its keys under `path.name` and no existing key moves.
    """

    path: str
    name: str
    new: nn.Module
    what: str
    where: Literal["before", "after"] = "before"

    def check(self, model: nn.Module) -> None:
        _check_child(model, self)

    def is_done(self, model: nn.Module) -> bool:
        return get_module(model, self.path)._modules.get(self.name) is self.new

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        host = get_module(model, self.path)
        self.new.train(host.training)
        host.add_module(self.name, self.new)
        if self.where == "before":
            handle = host.register_forward_pre_hook(_ActBefore(self.name), with_kwargs=True)
        else:
            handle = host.register_forward_hook(_ActAfter(self.name))

        def undo() -> None:
            handle.remove()
            host._modules.pop(self.name, None)  # a Remove may have come in between

        return Change(self.path, self.what), undo


def _check_child(model: nn.Module, edit: Insert | Attach | AttachAfter) -> None:
    """Whether `edit.name` can become a child of the module at `edit.path` that its hook calls."""
    host = get_module(model, edit.path)
    if not edit.name or "." in edit.name:
        raise EditError(f"{edit.name!r} is no name for a child module", where=edit.path, fix="use an identifier")
    is_called = not isinstance(edit, Attach) or edit.hook is not None
    if is_called and type(host).forward in (nn.Sequential.forward, nn.Module.forward):
        raise EditError(
            f"{type(host).__name__} runs its own children, or is never called", where=edit.path, fix="insert at a module inside it"
        )
    if hasattr(host, edit.name) and not edit.is_done(model):
        raise EditError(f"{edit.path}.{edit.name} exists already", where=edit.path, fix="undo the earlier edit first")


@dataclass(frozen=True)
class Attach:
    """Make `new` the child `name` of the module at `path`, and let `hook` use it on all arguments of a call.

    The hook reads the child from the module it receives, never from a closure: then copies and unpickled models use their own.
    None leaves the call alone, for a child that a `MixIn` uses. Keys are added under `path.name`, no existing key moves.
    """

    path: str
    name: str
    new: nn.Module
    what: str
    hook: PreHook | None = None

    def check(self, model: nn.Module) -> None:
        _check_child(model, self)

    def is_done(self, model: nn.Module) -> bool:
        return get_module(model, self.path)._modules.get(self.name) is self.new

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        host = get_module(model, self.path)
        self.new.train(host.training)
        host.add_module(self.name, self.new)
        handle = host.register_forward_pre_hook(self.hook, with_kwargs=True) if self.hook is not None else None

        def undo() -> None:
            if handle is not None:
                handle.remove()
            del host._modules[self.name]

        return Change(self.path, self.what), undo


@dataclass(frozen=True)
class AttachAfter:
    """Make `new` the child `name` of the module at `path`, and let `hook` make its output from arguments and output of a call.

    As for `Attach`, the hook reads the child from the module it receives.
    """

    path: str
    name: str
    new: nn.Module
    what: str
    hook: PostHook

    def check(self, model: nn.Module) -> None:
        _check_child(model, self)

    def is_done(self, model: nn.Module) -> bool:
        return get_module(model, self.path)._modules.get(self.name) is self.new

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        host = get_module(model, self.path)
        self.new.train(host.training)
        host.add_module(self.name, self.new)
        handle = host.register_forward_hook(self.hook, with_kwargs=True)

        def undo() -> None:
            handle.remove()
            del host._modules[self.name]

        return Change(self.path, self.what), undo


@dataclass(frozen=True)
class MixIn:
    """Give the module at `path` a subclass of its own class in which the methods of `mixin` come first.

    The module stays the same object with the same keys. The subclass has the name and the module of the class it stands for, and
    is rebuilt from the two where a model is unpickled.
    """

    path: str
    mixin: type[nn.Module]
    what: str

    def check(self, model: nn.Module) -> None:
        module = get_module(model, self.path)
        overridden = [name for name in vars(self.mixin) if name in vars(module)]
        if overridden:
            raise EditError(
                f"{', '.join(overridden)} of this {type(module).__name__} is set on the instance and would hide the edit",
                where=self.path,
                fix="define it in a class",
            )

    def is_done(self, model: nn.Module) -> bool:
        return isinstance(get_module(model, self.path), self.mixin)

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        module = get_module(model, self.path)
        before = type(module)
        module.__class__ = _subclass(self.mixin, before)

        def undo() -> None:
            if type(module) is not _subclass(self.mixin, before):
                raise EditError(
                    f"the class of this {before.__name__} was changed after the edit, so the edit cannot be undone",
                    where=self.path,
                    evidence=type(module).__qualname__,
                )
            module.__class__ = before

        return Change(self.path, self.what), undo


_subclasses: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _subclass(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """One class for each pair, so that two modules of one class are still of one class."""
    if (mixin, base) not in _subclasses:
        _subclasses[mixin, base] = _make_subclass(mixin, base)
    return _subclasses[mixin, base]


def _make_subclass(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    parts: tuple[type[nn.Module], ...] = (mixin, *vars(base).get("_parts", (base,)))

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new_instance, parts, base.__reduce_ex__(module, protocol)[2]

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "__reduce_ex__": reduce}
    return type(base.__name__, (mixin, base), {**names, "_parts": parts})


def _new_instance(*parts: type[nn.Module]) -> nn.Module:
    """An empty module of the class that mix-ins, the first in front, make of the last of `parts`."""
    *mixins, kind = parts
    for mixin in reversed(mixins):
        kind = _subclass(mixin, kind)
    return kind.__new__(kind)


@dataclass(frozen=True)
class _ActBefore:
    """Forward pre-hook that looks its child up by name, so that a deep copy or an unpickled model uses its own child."""

    name: str

    def __call__(self, host: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        child = host.get_submodule(self.name)
        if arguments:
            return (child(arguments[0]), *arguments[1:]), keywords
        first = next(iter(keywords))
        return arguments, {**keywords, first: child(keywords[first])}


@dataclass(frozen=True)
class _ActAfter:
    """Forward hook, the counterpart of `_ActBefore`."""

    name: str

    def __call__(self, host: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Any:
        return host.get_submodule(self.name)(output)


@dataclass(frozen=True)
class Remove:
    """Take out what `Insert` put in: the child `name` of the module at `path` and the hooks that call it, its keys with it."""

    path: str
    name: str
    what: str

    def check(self, model: nn.Module) -> None:
        get_module(model, self.path)

    def is_done(self, model: nn.Module) -> bool:
        return self.name not in get_module(model, self.path)._modules

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        host = get_module(model, self.path)
        registries: list[dict[Any, Any]] = [
            host._modules,
            host._forward_pre_hooks,
            host._forward_pre_hooks_with_kwargs,
            host._forward_hooks,
            host._forward_hooks_with_kwargs,
        ]
        before = [dict(registry) for registry in registries]
        del registries[0][self.name]
        for hooks in (host._forward_pre_hooks, host._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (_ActBefore, _ActAfter)) and hook.name == self.name]:
                for registry in registries[1:]:
                    registry.pop(key, None)

        def undo() -> None:
            for registry, content in zip(registries, before, strict=True):
                registry.clear()
                registry.update(content)

        return Change(self.path, self.what), undo


@dataclass(frozen=True)
class SetAttributes:
    """Set plain attributes (no parameters, buffers or modules) of the module at `path`."""

    path: str
    values: Mapping[str, Any]
    what: str

    def check(self, model: nn.Module) -> None:
        module = get_module(model, self.path)
        for name, value in self.values.items():
            if name in module._parameters or name in module._buffers or name in module._modules or not hasattr(module, name):
                raise EditError(f"{name!r} is no plain attribute of {type(module).__name__}", where=self.path)
            if isinstance(value, (nn.Module, nn.Parameter)):
                raise EditError(f"the value for {name!r} is a {type(value).__name__}", where=self.path, fix="use Replace or Insert")
            if isinstance(found := getattr(type(module), name, None), property) and found.fset is None:
                raise EditError(f"{name!r} of {type(module).__name__} is a property that cannot be set", where=self.path)

    def is_done(self, model: nn.Module) -> bool:
        module = get_module(model, self.path)
        return all(getattr(module, name) == value for name, value in self.values.items())

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        module = get_module(model, self.path)
        own = vars(module)
        before = {name: own.get(name, _ABSENT) for name in self.values}
        properties = {name: getattr(module, name) for name in self.values if isinstance(getattr(type(module), name, None), property)}

        def undo() -> None:
            for name, value in {**before, **properties}.items():
                if value is not _ABSENT:
                    setattr(module, name, value)
                elif name in own:
                    delattr(module, name)

        try:
            for name, value in self.values.items():
                setattr(module, name, value)
        except BaseException:
            undo()
            raise
        return Change(self.path, self.what), undo
