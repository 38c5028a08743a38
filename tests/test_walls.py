"""The import walls of the design, read from the source: nothing is imported to check them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "errata"

BASE = {"errors", "progress", "requests"}
ROOMS: dict[str, set[str]] = {  # room -> the rooms it may import, besides itself
    "errors": set(),
    "progress": set(),
    "requests": {"errors"},
    "algebra": BASE,
    "lm": BASE | {"algebra"},
    "edits": BASE | {"algebra", "lm"},
    "locate": BASE | {"algebra", "lm", "edits"},
    "editors": BASE | {"algebra", "lm", "edits", "locate"},
    "measure": BASE | {"lm"},
    "pocket": BASE,
    "jobs": BASE | {"algebra", "lm", "edits", "locate", "editors", "measure", "pocket"},
    "cli": {"errors", "progress", "jobs", "errata"},
    "studio": {"errors", "progress", "jobs", "errata"},
}

FAMILIES = {"closed_form", "hypernet", "memory", "tuning"}
"""Folders of `editors`: what two of them share stands beside them."""

METHOD_NAMES = {
    *("rome", "memit", "emmet", "mend", "salem", "ke", "enn", "serac", "grace", "scen"),
    *("t_patcher", "finetune", "neurons"),
}

MODEL_WORDS = ("transformer.h", "model.layers", "gpt_neox.layers", "model.decoder", "c_proj")
"""Parts of module paths: whoever holds one knows a model family."""

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> tuple[str, ...]:
    """The module's dotted name below `errata`, in parts; empty for `errata` itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """`errata.lm.load` -> `lm`; None for what is not ours."""
    parts = module.split(".")
    if parts[0] != "errata":
        return None
    return parts[1] if len(parts) > 1 and (parts[1] in ROOMS) else "errata"


def ids(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_rooms_import_only_what_stands_below_them(path: Path) -> None:
    name = name_of(path)
    if not name:
        pytest.skip("errata/__init__.py re-exports from everywhere")
    assert name[0] in ROOMS, f"{name[0]} is not a room of the design; add it there first"
    allowed = ROOMS[name[0]] | {name[0]}
    for module in imports(path):
        if (found := room(module)) is not None:
            assert found in allowed, f"{'.'.join(name)} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_algebra_knows_only_torch(path: Path) -> None:
    if name_of(path)[:1] != ("algebra",):
        return
    outside = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "errata"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_method_imports_another(path: Path) -> None:
    name = name_of(path)
    if name[:1] != ("editors",) or name[-1] not in METHOD_NAMES:
        return
    others = METHOD_NAMES - {name[-1]}
    for module in imports(path):
        assert not (module.startswith("errata.editors") and others & set(module.split(".")))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_family_of_methods_imports_another(path: Path) -> None:
    name = name_of(path)
    if name[:1] != ("editors",) or not FAMILIES & set(name):
        return
    others = FAMILIES - set(name)
    for module in imports(path):
        assert not (module.startswith("errata.editors") and others & set(module.split(".")))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_other_job_imports_those_of_experiments_or_of_locating(path: Path) -> None:
    name = name_of(path)
    if name[:1] != ("jobs",):
        return
    for module in imports(path):
        for folder in {"studies", "locating"} - {name[1] if len(name) > 1 else ""}:
            assert not module.startswith(f"errata.jobs.{folder}")


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_ray_lives_in_one_file(path: Path) -> None:
    if name_of(path) != ("jobs", "cluster"):
        assert all(module.split(".")[0] != "ray" for module in imports(path))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_module_paths_live_in_lm(path: Path) -> None:
    name = name_of(path)
    if name[:1] == ("lm",):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            found = [word for word in MODEL_WORDS if word in node.value]
            assert not found, f"line {node.lineno} knows a model family: {node.value!r}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_library_does_not_print(path: Path) -> None:
    if name_of(path)[:1] == ("cli",):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mains = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "main"]
    allowed = {id(call) for main in mains for call in ast.walk(main)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and id(node) not in allowed
        ):
            assert node.func.id != "print", f"line {node.lineno} prints; log instead"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_device_is_taken_for_granted(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda" or _is_torch(node.value), f"line {node.lineno} calls .cuda()"


def _is_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "torch"


def test_importing_errata_is_cheap() -> None:
    code = "import sys, errata; dir(errata); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_help_is_cheap() -> None:
    code = (
        "import sys\nfrom errata.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip().endswith("False")


def test_public_names_exist() -> None:
    import errata

    for name in errata.__all__:
        assert getattr(errata, name) is not None
