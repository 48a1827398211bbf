from __future__ import annotations

import pickle

import pytest

from pl_normkit import errors
from pl_normkit.errors import NormkitError, NormkitWarning, nearest

FAMILY = [value for name in errors.__all__ if isinstance(value := getattr(errors, name), type) and issubclass(value, Exception)]
RAISED = [kind for kind in FAMILY if kind is not NormkitWarning]


def test_the_message_says_what_where_evidence_mend_and_silence() -> None:
    error = NormkitError("it broke", where="a.b", evidence="7", fix="use 8", silence="--quiet")
    assert str(error) == "it broke\n  where: a.b\n  seen: 7\n  fix: use 8\n  silence: --quiet"


def test_what_is_not_given_is_not_mentioned() -> None:
    assert str(NormkitError("it broke", fix="use 8")) == "it broke\n  fix: use 8"


@pytest.mark.parametrize("kind", RAISED)
def test_every_error_belongs_to_the_family(kind: type[Exception]) -> None:
    assert issubclass(kind, NormkitError)


@pytest.mark.parametrize("kind", RAISED)
def test_an_error_survives_pickling(kind: type[NormkitError]) -> None:
    error = kind("it broke", where="a.b", evidence="7", fix="use 8", silence="--quiet")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (kind, vars(error), str(error))


def test_an_edit_that_matches_nothing_is_an_edit_error() -> None:
    assert issubclass(errors.NothingMatchedError, errors.EditError)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("NK110", "did you mean 'NK101'?"), ("dropout-befor-norm", "did you mean 'dropout-before-norm'?"), ("zzz", ""), ("", "")],
)
def test_nearest_names_a_close_word_or_nothing(word: str, expected: str) -> None:
    assert nearest(word, ["NK101", "dropout-before-norm"]) == expected


def test_nearest_takes_an_empty_list() -> None:
    assert nearest("NK101", []) == ""
