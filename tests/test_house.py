"""The house itself: what an import loads, who may import whom, who may edit, and what a wheel holds."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import pl_normkit

ROOT = Path(__file__).parents[1]
FOLDERS = {"pl_normkit": ROOT / "pl_normkit", "pl_normkit.callbacks": ROOT / "callbacks", "pl_normkit.recipes": ROOT / "recipes"}
HEAVY = ("lightning", "pytorch_lightning", "timm", "torchvision", "segmentation_models_pytorch", "transformers", "torchmetrics", "rich")


def modules() -> dict[str, Path]:
    """Every module of the tree by the name it is imported under."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Modules that `name` imports anywhere in its file, in a function too; not what only type checkers see."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            submodules = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {source}
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (inner for other in child.orelse for inner in ast.walk(other))
            continue
        yield child
        yield from _walk(child)


IMPORTS = {name: imports_of(name) for name in MODULES}


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(name: str) -> str:
    return name.removeprefix("pl_normkit.methods.").partition(".")[0] if name.startswith("pl_normkit.methods.") else ""


def test_the_tree_and_its_imports_were_read() -> None:
    assert "pl_normkit.rules" in IMPORTS["pl_normkit.auditing"]
    assert "pl_normkit.report.sarif" in IMPORTS["pl_normkit.report"]  # an import inside a function counts
    assert "pl_normkit.graph" not in IMPORTS["pl_normkit.rules"]  # one under TYPE_CHECKING does not
    assert {"pl_normkit.callbacks.model_audit", "pl_normkit.recipes.segmentation"} <= MODULES.keys()


def test_methods_never_import_each_other() -> None:
    crossings = {
        (name, target)
        for name, targets in IMPORTS.items()
        for target in targets
        if room_of(name) and room_of(target) not in {"", room_of(name)}
    }
    assert crossings == set()


# Who must not import whom. `errors` may be imported by everyone.
FORBIDDEN = {
    "pl_normkit.errors": ["pl_normkit"],
    "pl_normkit.wrappers": ["pl_normkit"],
    "pl_normkit.changes": ["pl_normkit"],
    "pl_normkit.subject": [
        "graph",
        "surgery",
        "rules",
        "selection",
        "methods",
        "auditing",
        "report",
        "cli",
        "specs",
        "callbacks",
        "recipes",
    ],
    "pl_normkit.selection": ["graph", "surgery", "methods", "auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.findings": ["graph", "surgery", "rules", "methods", "auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.graph": ["rules", "surgery", "methods", "auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.surgery": ["rules", "graph", "methods", "auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.preserve": ["rules", "graph", "methods", "auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.rules": ["graph", "surgery", "methods", "auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.methods": ["auditing", "report", "cli", "specs", "callbacks", "recipes"],
    "pl_normkit.receptive_field": ["graph", "surgery", "methods", "auditing", "report", "cli", "callbacks", "recipes"],
    "pl_normkit.auditing": ["methods", "cli", "callbacks", "recipes"],
    "pl_normkit.report": ["methods", "auditing", "cli", "callbacks", "recipes"],
    "pl_normkit.specs": ["methods", "auditing", "report", "cli", "callbacks", "recipes"],
    "pl_normkit.cli": ["methods", "callbacks"],
    "pl_normkit.callbacks": ["cli", "recipes"],
}


@pytest.mark.parametrize(("package", "forbidden"), FORBIDDEN.items(), ids=FORBIDDEN)
def test_imports_point_down(package: str, forbidden: list[str]) -> None:
    names = [name for name in MODULES if is_in(name, package)]
    assert names
    targets = [target if target == "pl_normkit" else f"pl_normkit.{target}" for target in forbidden]
    crossings = {(name, target) for name in names for target in IMPORTS[name] if any(is_in(target, other) for other in targets)}
    assert crossings == set()


def test_lightning_stays_in_callbacks_and_recipes() -> None:
    importers = {name for name, targets in IMPORTS.items() if any(is_in(t, p) for t in targets for p in ("lightning", "pytorch_lightning"))}
    assert {name for name in importers if not is_in(name, "pl_normkit.callbacks") and not is_in(name, "pl_normkit.recipes")} == set()
    assert "pl_normkit.callbacks._lightning" in importers


def test_model_libraries_are_imported_by_the_recipes_only() -> None:
    """`specs` loads them by name when a specification asks for one."""
    libraries = ("timm", "torchvision", "segmentation_models_pytorch", "transformers")
    importers = {name for name, targets in IMPORTS.items() if any(is_in(t, p) for t in targets for p in libraries)}
    assert {name for name in importers if not is_in(name, "pl_normkit.recipes")} == set()


TREE_METHODS = {"add_module", "register_module", "set_submodule", "register_parameter"}
REGISTRIES = {"_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "__class__"}


def tree_edits(source: str) -> list[str]:
    """Statements that change the modules, parameters or class of some other object than `self`."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if _edits_by_call(node) or _edits_by_assignment(node)]


def _edits_by_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if ast.unparse(node.func) in {"setattr", "delattr", "object.__setattr__", "object.__delattr__"}:
        return ast.unparse(node.args[0]) != "self"
    if not isinstance(node.func, ast.Attribute) or ast.unparse(node.func.value) == "self":
        return False
    return node.func.attr in TREE_METHODS or (node.func.attr in {"update", "pop", "clear", "setdefault"} and _is_registry(node.func.value))


def _edits_by_assignment(node: ast.AST) -> bool:
    targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
    return any(_is_registry(target.value) if isinstance(target, ast.Subscript) else _is_registry(target) for target in targets)


def _is_registry(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in REGISTRIES and ast.unparse(node.value) != "self"


@pytest.mark.parametrize(
    "statement",
    [
        "host.add_module('a', x)",
        "model._modules['a'] = x",
        "del host._modules['a']",
        "m.set_submodule('a', x)",
        "m._modules.update(a=x)",
        "setattr(host, name, module)",
        "object.__setattr__(host, 'a', x)",
        "host._parameters = {}",
        "host.__class__ = Other",
    ],
)
def test_an_edit_is_recognized(statement: str) -> None:
    assert tree_edits(statement) == [statement]
    assert tree_edits("self.add_module('a', x)\nfor name in m._modules: print(m._modules[name])\nsetattr(self, 'a', x)") == []


NO_TREE_EDITS = {
    "pl_normkit.callbacks._wrapping": "a method of a LightningModule, for one call",
    "pl_normkit.methods.weight_decay.optimizers": "groups and the lists of a scheduler",
    "pl_normkit.methods.positional_variance.fix": "the record of an edit that surgery runs",
    "pl_normkit.methods.fusion_scale.fold": "the mark of an edit that surgery runs",
    "pl_normkit.methods.norm_operators.rows": "mask and time of norms during the calls in a block",
    "pl_normkit.methods.norm_placement.pieces": "the mark of an edit that surgery runs",
    "pl_normkit.methods.nan_safety.diagnosis.replay": "logging is silent while a step runs again, and is put back",
    "pl_normkit.methods.nan_safety.diagnosis.rerun": "logging is silent while a step runs again, and is put back",
}
"""Modules that set attributes of other objects, and what these are."""


def test_only_surgery_edits_module_trees() -> None:
    edits = {name: found for name, path in MODULES.items() if (found := tree_edits(path.read_text()))}
    assert set(edits) == {"pl_normkit.surgery", *NO_TREE_EDITS}


def test_files_stay_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length >= 450} == {}


def test_files_of_tests_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "pl_normkit/methods").glob("*/__init__.py")))
def test_a_room_opens_with_a_line_for_each_file(room: str) -> None:
    folder = ROOT / "pl_normkit/methods" / room
    opening = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"} | {
        f"{path.parent.name}/" for path in folder.glob("*/__init__.py")
    }
    assert sorted(name for name in files if f"\n    {name} " not in f"{opening} ") == []


def test_every_name_of_the_front_door_has_one_home_and_is_seen_by_type_checkers() -> None:
    rooms = sorted((ROOT / "pl_normkit/methods").glob("*/__init__.py"))
    exported = [name for names in pl_normkit._CORE.values() for name in names]
    exported += [name for room in rooms for name in pl_normkit._exports(room)]
    assert sorted(exported) == sorted(pl_normkit._homes())
    block = (ROOT / "pl_normkit/__init__.py").read_text()
    seen = {room.parent.name for room in rooms if f"    from pl_normkit.methods.{room.parent.name} import *\n" in block}
    assert seen == {room.parent.name for room in rooms}


def test_an_import_loads_torch_at_most(tmp_path: Path) -> None:
    code = f"import sys, pl_normkit; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built offline from a copy of the tree, so that no old build folder leaks into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pl_normkit", "callbacks", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--wheel-dir",
        str(folder),
        ".",
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_under_its_name(wheel: zipfile.ZipFile) -> None:
    """Links stand for the folders they name: nothing is missing, and nothing is there twice."""
    expected = set()
    for package, folder in FOLDERS.items():
        base = Path(*package.split("."))
        files = [path for path in folder.rglob("*") if path.suffix in {".py", ".yaml", ".typed", ".html", ".css", ".js", ".json"}]
        expected |= {(base / path.relative_to(folder)).as_posix() for path in files}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert {"pl_normkit/py.typed", "pl_normkit/callbacks/__init__.py", "pl_normkit/recipes/segmentation/__init__.py"} <= expected


def test_the_wheel_names_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = f"pl_normkit-{project['version']}.dist-info"
    assert "pl-normkit = pl_normkit.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_version_is_said_once_more_in_the_package() -> None:
    import pl_normkit

    assert pl_normkit.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_wheel_imports_where_it_is_unpacked(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "from importlib.util import find_spec; import pl_normkit.rules; pl_normkit.rules.load_rules();"
        "print(find_spec('pl_normkit.callbacks').origin)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / "pl_normkit" / "callbacks" / "__init__.py")), result.stderr
