from __future__ import annotations

import io

import pytest

from pl_normkit.output import CalmStream, calm


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ntext\n", "plain\ntext\n"),
        ("::error::x", ": :error::x"),
        ("a\n  ::error::x", "a\n  : :error::x"),
        ("a\r::error::x", "a\r: :error::x"),
        ("a\u2028::error::x", "a\u2028: :error::x"),
        ("package::name", "package::name"),
        ("##[error]x ##vso[task] ##teamcity[x", "# #[error]x # #vso[task] # #teamcity[x"),
        ("## title", "## title"),
    ],
)
def test_no_line_is_a_workflow_command(text: str, expected: str) -> None:
    stream = io.StringIO()
    CalmStream(stream).write(text)  # type: ignore[arg-type]
    assert (calm(text), stream.getvalue()) == (expected, expected)
