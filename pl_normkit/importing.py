"""From words to objects: `package.module:name`, and calls such as `package.Class(option=1)`; of the text only literals are evaluated."""

from __future__ import annotations

__all__ = ["LiteralCall", "import_dotted", "import_library", "import_object", "literal_calls", "summary_of", "users_code"]

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pl_normkit.errors import ModelSpecError, NormkitError, nearest


@contextmanager
def users_code(what: str, *, where: str = "", fix: str = "", kind: type[NormkitError] = ModelSpecError) -> Iterator[None]:
    """Turn whatever the code in the block raises into one error, `sys.exit` too: a command must not end with its exit code.

    Errors of this library pass as they are, and so does the interrupt key.
    """
    try:
        yield
    except NormkitError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(what, where=where, evidence=summary_of(error), fix=f"{fix}; --debug shows the traceback".lstrip("; ")) from error


def summary_of(error: BaseException) -> str:
    """The kind of the error with the first line of its text."""
    lines = str(error).strip().splitlines()
    if isinstance(error, SystemExit):
        return f"it called sys.exit({lines[0] if lines else ''})"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def import_object(spec: str) -> Any:
    """The object `package.module:name`, looked for in the working directory too. Raises ModelSpecError."""
    source, _, name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = import_library(source)
    with users_code(f"{spec} cannot be looked up"):
        try:
            found = module
            for part in name.split("."):
                found = getattr(found, part)
        except AttributeError as error:
            raise ModelSpecError(f"{source} has no {name!r}", fix=nearest(name, dir(module)) or f"see dir({source})") from error
    return found


def import_library(module: str, package: str = "") -> Any:
    """The module named `module`, which `pip install {package}` gives. Raises ModelSpecError that says why it is not to be had."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        known = "" if error.name == module.partition(".")[0] else f"while importing {module}"
        get = f"pip install {package}" if package else "run where it can be imported from (a module, not a file: no .py)"
        raise ModelSpecError(f"there is no module {error.name!r}", where=known, fix=f"{get}, or check the spelling") from error
    except (Exception, SystemExit) as error:
        if "torchvision::" not in str(error):
            raise ModelSpecError(
                f"{module} cannot be imported",
                evidence=summary_of(error),
                fix="fix the module, or check the spelling; --debug shows the traceback",
            ) from error
        raise ModelSpecError(
            "torchvision does not fit the installed torch",
            evidence=str(error).splitlines()[0],
            fix="a CPU-only build of torch lacks what torchvision needs: install torch and torchvision together from the package registry",
        ) from error


@dataclass(frozen=True)
class LiteralCall:
    """A call with literal arguments, as it was written.

    Attributes:
        text: the words it was read from, spaced in one way.
        path: dotted name of what is called.
        arguments: by position.
        options: by name; what `**` unpacks is under "**".
    """

    text: str
    path: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def literal_calls(text: str) -> list[LiteralCall]:
    """The calls in `Name(1, option=2), package.Other`; a name alone is a call without arguments.

    Raises SyntaxError for text of another form, ValueError for an argument that is no literal.
    """
    try:
        nodes = ast.parse(f"[{text.strip()}]", mode="eval").body
    except ValueError as error:  # a null character
        raise SyntaxError(str(error)) from error
    elements = nodes.elts if isinstance(nodes, ast.List) else []
    return [_literal_call(node) for node in elements]


def _literal_call(node: ast.expr) -> LiteralCall:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    arguments = tuple(ast.literal_eval(argument) for argument in call.args)
    options = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    return LiteralCall(ast.unparse(node), ast.unparse(call.func), arguments, options)


def import_dotted(path: str, home: str = "") -> Any:
    """The object at the dotted `path`; a bare name is one of the module `home`. Raises ImportError or AttributeError."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module or home), name)
