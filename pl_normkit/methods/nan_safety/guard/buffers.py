"""The last good values of all buffers, whatever happens to them: written to, assigned anew, added, resized or deleted. Derived here.

Parameters without a gradient that other code writes to (a teacher's, a codebook's) are kept like buffers."""

from __future__ import annotations

__all__ = ["BufferShadow"]

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook

from pl_normkit.methods.nan_safety.guard.decision import has_values, local, total_of
from pl_normkit.methods.nan_safety.guard.written import WrittenParameters, is_plain, mark_of

SMALL = 4096
"""Buffers up to this many entries are compared and copied in every step; larger ones when torch says that they changed."""

Key = tuple[int, str]
Registry = dict[str, Any]


@dataclass
class _Kept:
    """The value of a buffer: `tensor` is the object that was registered, `value` a copy of what it held."""

    tensor: Tensor
    value: Tensor
    mark: tuple[Any, ...]
    silent: bool


@dataclass
class _Slot:
    """One entry of a module's buffers or parameters; `normal` are the non-finite values that are no fault in it."""

    module: nn.Module
    registry: Registry
    name: str
    tensor: Tensor | None
    normal: frozenset[float]


Change = tuple[Registry, _Slot | None, nn.Module, str, Tensor | None]


@dataclass
class _Look:
    """What differs now from the last good state."""

    changed: list[Change]
    gone: list[_Slot]


class BufferShadow:
    """The last good buffers of a module, on their own device.

    Only what changes is copied. A change shows by another object, version, shape or storage; writes that torch does not count (the kernels
    of norm layers, `.data`) are found by comparison: small buffers always, large ones in steps 1, 2, 4, 8, ... and from then on always.
    Infinities and NaN that a buffer holds when it is first seen (masks of -inf, extremes that start at infinity) are no fault in it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._slots: dict[Key, _Slot] = {}
        self._kept: dict[int, _Kept] = {}
        self._registered: dict[Key, tuple[nn.Module, Tensor]] = {}
        self._accepted = 0
        self._written = WrittenParameters(module)
        self._hook = register_module_buffer_registration_hook(self._note_registration)
        for registry, owner, name, buffer in self._walk():
            self._slots[id(registry), name] = _Slot(owner, registry, name, buffer, _kinds(buffer))
            self._keep(owner, buffer)

    def close(self) -> None:
        self._hook.remove()

    @property
    def parameters(self) -> set[int]:
        """Ids of the parameters that are kept, too."""
        return self._written.ids

    # -- what is there

    def _walk(self) -> Iterator[tuple[Registry, nn.Module, str, Tensor | None]]:
        waiting, seen = [self._module], set()
        while waiting:
            module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            waiting += [child for child in module._modules.values() if child is not None]
            for name, buffer in module._buffers.items():
                if buffer is None or has_values(buffer):
                    yield module._buffers, module, name, buffer
            if self._written.ids:
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in self._written.ids and not parameter.requires_grad:
                        yield module._parameters, module, name, parameter

    def _note_registration(self, module: nn.Module, name: str, buffer: Tensor | None) -> None:
        """A buffer that is new: its value as registered, should it go bad in the very step that made it."""
        key = id(module._buffers), name
        if buffer is not None and key not in self._slots and has_values(buffer):
            self._registered[key] = module, _clone(buffer)

    def _look(self) -> _Look:
        look, present = _Look([], []), set()
        for registry, module, name, buffer in self._walk():
            key = id(registry), name
            present.add(key)
            slot = self._slots.get(key)
            same = slot is not None and slot.tensor is buffer
            if not same or (buffer is not None and self._moved(buffer)):
                look.changed.append((registry, slot, module, name, buffer))
        look.gone = [slot for key, slot in self._slots.items() if key not in present]
        return look

    def _moved(self, buffer: Tensor) -> bool:
        kept = self._kept.get(id(buffer))
        return kept is None or kept.silent or kept.mark != mark_of(buffer)

    def _keep(self, owner: nn.Module, buffer: Tensor | None) -> None:
        if buffer is None:
            return
        kept = self._kept.get(id(buffer))
        if kept is not None and kept.value.shape == local(buffer).shape and is_plain(buffer):
            kept.value.copy_(local(buffer))
            kept.mark = mark_of(buffer)
        else:
            silent = buffer.numel() <= SMALL or _is_norm(owner) or (kept is not None and kept.silent)
            self._kept[id(buffer)] = _Kept(buffer, _clone(buffer), mark_of(buffer), silent)

    # -- judging

    def bad(self) -> Tensor:
        """Whether a buffer is not finite now where it should be, as a boolean scalar on its device. Nothing waits."""
        return self._badness(self._look())

    def _badness(self, look: _Look) -> Tensor:
        plain: list[Tensor] = []
        found: list[Tensor] = []
        for _, slot, _, _, buffer in look.changed:
            if slot is None or slot.tensor is None or buffer is None or not _can_be_bad(buffer) or not buffer.numel():
                continue  # what is seen for the first time may hold what it likes
            normal = self._normal(slot, buffer)
            if normal:
                found.append(_abnormal(local(buffer), normal))
            else:
                plain.append(local(buffer))
        if plain:
            found.append(~torch.isfinite(total_of(plain)))
        return torch.stack([answer.to(found[0].device) for answer in found]).any() if found else torch.zeros((), dtype=torch.bool)

    def _normal(self, slot: _Slot, buffer: Tensor) -> frozenset[float]:
        """A buffer that was made anew in another shape may be a mask: -inf is no fault in it."""
        assert slot.tensor is not None
        resized = slot.tensor is not buffer and slot.tensor.shape != buffer.shape
        return slot.normal | {-math.inf} if resized else slot.normal

    def bad_names(self) -> list[str]:
        """Buffers that are not finite now where they should be. Waits for the device."""
        return [self._path(module, name) for _, slot, module, name, buffer in self._look().changed if self._is_bad(slot, buffer)]

    def _is_bad(self, slot: _Slot | None, buffer: Tensor | None) -> bool:
        if slot is None or slot.tensor is None or buffer is None:
            return False
        return bool(_abnormal(local(buffer), self._normal(slot, buffer)))

    def forgive(self) -> list[str]:
        """Take the non-finite values that buffers hold now for normal in them, except in norm layers; names those buffers.

        For buffers like a table of per-class scores, where 0/0 says that a class has not been seen.
        """
        names = []
        for _, slot, module, name, buffer in self._look().changed:
            if slot is not None and not _is_norm(module) and self._is_bad(slot, buffer):
                names.append(self._path(module, name))
                slot.normal |= _kinds(buffer)
        return names

    # -- keeping and putting back

    def accept(self) -> None:
        """Take the current values as good. The caller knows that they are."""
        self._accepted += 1
        look = self._look()
        for slot in look.gone:
            del self._slots[id(slot.registry), slot.name]
        for change in look.changed:
            self._take(change)
        if self._accepted & (self._accepted - 1) == 0:
            self._find_silent()
        if self._written.update():
            for change in self._look().changed:
                self._take(change)
        if len(self._kept) > len(self._slots):
            wanted = {id(slot.tensor) for slot in self._slots.values()}
            self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}
        self._registered.clear()

    def _take(self, change: Change) -> None:
        registry, slot, module, name, buffer = change
        if slot is None or slot.tensor is None:
            normal = _kinds(buffer)
        else:
            normal = slot.normal if buffer is None else self._normal(slot, buffer)
        self._slots[id(registry), name] = _Slot(module, registry, name, buffer, normal)
        self._keep(module, buffer)

    def _find_silent(self) -> None:
        """Large buffers that were written to in a way that torch does not count, by comparison."""
        for slot in self._slots.values():
            kept = None if slot.tensor is None else self._kept[id(slot.tensor)]
            if kept is not None and not kept.silent and not _equal(kept.tensor, kept.value):
                kept.silent = True
                self._keep(slot.module, kept.tensor)

    def accept_outside(self) -> list[str]:
        """Take what changed between two steps (a teacher's average, say), put back what of it is bad, and name that."""
        names: list[str] = []
        for change in self._look().changed:
            _, slot, module, name, buffer = change
            if buffer is not None and slot is not None and slot.tensor is buffer and self._kept[id(buffer)].mark == mark_of(buffer):
                continue  # only perhaps changed; the next step will see
            if slot is not None and self._is_bad(slot, buffer):
                names.append(self._path(module, name))
                self._put_back(slot)
            else:
                self._take(change)
        return names

    def _path(self, module: nn.Module, name: str) -> str:
        path = next((path for path, found in self._module.named_modules() if found is module), "")
        return f"{path}.{name}" if path else name

    def restore(self) -> None:
        """Put all buffers back as they were at the last good step: values, objects, presence."""
        for slot in list(self._slots.values()):
            self._put_back(slot)
        for registry, module, name, buffer in list(self._walk()):
            key = id(registry), name
            if (
                registry is module._buffers
                and key not in self._slots
                and buffer is not None
                and bool(_abnormal(local(buffer), frozenset()))
            ):
                owner, first = self._registered.get(key, (None, buffer))
                if owner is module and not bool(_abnormal(local(first), frozenset())):
                    module._buffers[name] = first.clone()
                else:
                    del module._buffers[name]

    def restore_bad(self) -> list[str]:
        """Put back only those that are not finite, and name them."""
        names = []
        for _, slot, module, name, buffer in self._look().changed:
            if slot is not None and self._is_bad(slot, buffer):
                names.append(self._path(module, name))
                self._put_back(slot)
        return names

    def _put_back(self, slot: _Slot) -> None:
        if slot.tensor is None:
            slot.registry[slot.name] = None
            return
        kept = self._kept[id(slot.tensor)]
        looks_same = not self._moved(slot.tensor)
        if not _equal(slot.tensor, kept.value):
            if looks_same and not self._is_bad(slot, slot.tensor):
                kept.silent = True  # written to unseen, perhaps long ago: what it held before this step is not known
                self._keep(slot.module, slot.tensor)
            elif not _write(slot.tensor, kept.value):
                slot.tensor = kept.tensor = kept.value.clone()
                self._kept[id(slot.tensor)] = kept
        kept.mark = mark_of(slot.tensor)
        if slot.registry.get(slot.name) is not slot.tensor:
            slot.registry[slot.name] = slot.tensor

    def settle(self, bad: Tensor) -> None:
        """`restore` where the device scalar `bad` is not 0, `accept` where it is 0, without reading it.

        It is read where a buffer is new, gone, or of another shape.
        """
        look = self._look()
        if look.gone or any(not self._can_settle(slot, buffer) for _, slot, _, _, buffer in look.changed):
            self.restore() if bool(bad) else self.accept()
            return
        for registry, slot, module, name, buffer in look.changed:
            if slot is None or slot.tensor is None or buffer is None:
                continue  # not so: `_can_settle` has looked
            kept = self._kept[id(slot.tensor)]
            current = local(buffer)
            kept.value.copy_(torch.where(bad.to(current.device) > 0, kept.value, current))
            _write(buffer, kept.value)
            if buffer is not slot.tensor:
                self._kept[id(buffer)] = _Kept(buffer, kept.value, (), kept.silent)
                self._slots[id(registry), name] = _Slot(module, registry, name, buffer, slot.normal)
            self._kept[id(buffer)].mark = mark_of(buffer)

    def _can_settle(self, slot: _Slot | None, buffer: Tensor | None) -> bool:
        if slot is None or slot.tensor is None or buffer is None or not is_plain(buffer) or not is_plain(slot.tensor):
            return False
        kept = self._kept[id(slot.tensor)]
        return kept.value.shape == local(buffer).shape and kept.value.dtype == buffer.dtype


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)


def _clone(buffer: Tensor) -> Tensor:
    """A copy of what this rank holds, in its own layout."""
    with torch.inference_mode(False), torch.no_grad():
        held: Tensor = buffer.to_local() if hasattr(buffer, "to_local") else buffer
        return held.detach().clone()


def _can_be_bad(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _kinds(buffer: Tensor | None) -> frozenset[float]:
    """Which non-finite values `buffer` holds. Waits for the device."""
    if buffer is None or not _can_be_bad(buffer):
        return frozenset()
    values = local(buffer)
    if math.isfinite(total_of([values]).item()):
        return frozenset()
    tests: dict[float, Callable[[Tensor], Tensor]] = {math.nan: torch.isnan, math.inf: torch.isposinf, -math.inf: torch.isneginf}
    parts = _parts(values)
    return frozenset(kind for kind, test in tests.items() if any(bool(test(part).any()) for part in parts))


def _abnormal(values: Tensor, normal: frozenset[float]) -> Tensor:
    """Whether `values` hold something that is neither finite nor in `normal`, as a scalar on their device."""
    if not _can_be_bad(values):
        return torch.zeros((), dtype=torch.bool)
    found = torch.zeros((), dtype=torch.bool, device=values.device)
    for part in _parts(values):
        bad = ~torch.isfinite(part)
        for kind in normal:
            bad = bad & ~(torch.isnan(part) if math.isnan(kind) else part == kind)
        found = found | bad.any()
    return found


def _parts(values: Tensor) -> list[Tensor]:
    return [values.real, values.imag] if values.is_complex() else [values]


def _equal(buffer: Tensor, value: Tensor) -> bool:
    """Bit for bit, with NaN equal to NaN."""
    now, then = _clone(buffer) if buffer.is_inference() else local(buffer), local(value)
    if now.shape != then.shape or now.dtype != then.dtype or not _same_places(buffer, value):
        return False
    if torch.equal(now, then):
        return True
    return _can_be_bad(now) and bool(((now == then) | (torch.isnan(now) & torch.isnan(then))).all())


def _same_places(buffer: Tensor, value: Tensor) -> bool:
    if buffer.layout == torch.sparse_coo:
        return buffer.shape == value.shape and torch.equal(buffer._indices(), value._indices())
    if buffer.layout in (torch.sparse_csr, torch.sparse_bsr):
        return torch.equal(buffer.crow_indices(), value.crow_indices()) and torch.equal(buffer.col_indices(), value.col_indices())
    return True


def _write(buffer: Tensor, value: Tensor) -> bool:
    """Write `value` into the object `buffer`; False where torch does not allow it."""
    try:
        with torch.no_grad():
            if hasattr(buffer, "to_local"):
                buffer.to_local().copy_(value)
            elif buffer.shape == value.shape and buffer.dtype == value.dtype and is_plain(buffer):
                buffer.copy_(value)
            else:
                buffer.data = value.clone()
    except RuntimeError:  # an inference tensor, or memory that several entries share
        return False
    return True
