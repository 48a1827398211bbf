"""Notes go by identity, keep no tensor alive, and are never another tensor's."""

from __future__ import annotations

import torch

from pl_normkit.first_step.tensor_notes import TensorNotes


def test_notes_are_by_identity() -> None:
    notes: TensorNotes[str] = TensorNotes()
    first, equal = torch.ones(2), torch.ones(2)
    assert (bool(notes), first in notes, notes.get(first)) == (False, False, None)
    notes[first] = "a"
    assert (notes[first], notes.get(first, "b"), notes.get(equal, "b"), equal in notes) == ("a", "a", "b", False)


def test_what_takes_a_dead_tensors_place_has_no_note() -> None:
    notes: TensorNotes[int] = TensorNotes()
    for number in range(200):  # new tensors often get the address of the last one
        tensor = torch.ones(3)
        assert tensor not in notes
        assert notes.get(tensor, -1) == -1
        notes[tensor] = number
        assert notes[tensor] == number
        del tensor


def test_a_tensor_that_torch_alone_holds_keeps_its_note() -> None:
    notes: TensorNotes[str] = TensorNotes()
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    notes[x.grad] = "kept"  # type: ignore[index]
    assert x.grad is not None
    assert notes[x.grad] == "kept"
