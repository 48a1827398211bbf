"""From the words `package.module:name` to the object."""

from __future__ import annotations

__all__ = ["import_library", "import_object", "summary_of", "users_code"]

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pl_normkit.errors import ModelSpecError, NormkitError, nearest


@contextmanager
def users_code(what: str, *, where: str = "", mend: str = "", kind: type[NormkitError] = ModelSpecError) -> Iterator[None]:
    """Turn whatever the code in the block raises into one error, `sys.exit` too: a command must not end with its exit code.

    Errors of this library pass as they are, and so does the interrupt key.
    """
    try:
        yield
    except NormkitError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(what, where=where, evidence=summary_of(error), mend=f"{mend}; --debug shows the traceback".lstrip("; ")) from error


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
            raise ModelSpecError(f"{source} has no {name!r}", mend=nearest(name, dir(module)) or f"see dir({source})") from error
    return found


def import_library(module: str, package: str = "") -> Any:
    """The module named `module`, which `pip install {package}` gives. Raises ModelSpecError that says why it is not to be had."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        known = "" if error.name == module.partition(".")[0] else f"while importing {module}"
        get = f"pip install {package}" if package else "run where it can be imported from (a module, not a file: no .py)"
        raise ModelSpecError(f"there is no module {error.name!r}", where=known, mend=f"{get}, or check the spelling") from error
    except (Exception, SystemExit) as error:
        if "torchvision::" not in str(error):
            raise ModelSpecError(
                f"{module} cannot be imported",
                evidence=summary_of(error),
                mend="mend the module, or check the spelling; --debug shows the traceback",
            ) from error
        raise ModelSpecError(
            "torchvision does not fit the installed torch",
            evidence=str(error).splitlines()[0],
            mend="a CPU-only build of torch lacks what torchvision needs: install torch and torchvision together from the package registry",
        ) from error
