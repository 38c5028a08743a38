"""What a result depends on, as hashes; together they are the key under which it is kept.

Two runs share a key only if they would compute the same numbers. In the key are: the method with
all of its numbers (the recipe's and the defaults' too), protocol, seed, and hashes of

- *the model*: its files, byte by byte; for a model that is no folder here, its tensors;
- *the cases*: the sample that was drawn, every prompt of it;
- *the text* that second moments are taken over;
- *the fit* of a method that must learn first: its cases and numbers, the model, the code that fits;
- *the code*: the source of the method's module, of those that score (`SCORING`), of every module
  of errata that these import, directly or not, and of the jobs that compute (`COMPUTING`).
  Comments, docstrings and layout are left out: to explain code does not throw away results, nor
  does another method.

Not in the key: names (of models, editors, files), and the versions of libraries and the machine.
They change the last bits, not the findings, and a key that held them would throw all results away
with every update. Each row's record tells them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from errata.editors import EDITORS
from errata.editors.closed_form.corpus import read_corpus
from errata.editors.trainable import TrainingCases
from errata.edits.edit import as_json
from errata.jobs.cluster import held
from errata.jobs.methods import config_for
from errata.jobs.models import located
from errata.jobs.moments import TOKENS, text_for
from errata.jobs.studies.units import UNEDITED, Unit, chosen_by, config_of, settings_of
from errata.lm.load import POCKET, pocket_folder
from errata.lm.weights import weight_hash
from errata.requests import Case

SCORING = ("errata.measure.score", "errata.measure.editing", "errata.measure.drift")

LOCATING = ("errata.locate.saliency", "errata.locate.tracing")
"""What chooses layers."""

COMPUTING = (
    "cases",
    "layers",
    "methods",
    "moments",
    "studies.protocols",
    "score",
    "studies.scoring",
    "studies.stream",
    "variants",
)
"""The jobs whose own code counts; not what they import, much of which only tells."""

FITTING = ("cases", "studies.fits", "layers", "methods")
"""The jobs whose own code counts in a fit."""

TABLE = "errata.editors"
"""Lists all methods, so it is not followed."""


def unit_key(unit: Unit, *, model: str, cases: str, text: str, code: str, fit: str = "") -> str:
    """SHA-256 of a unit and of the hashes of what it works on; hexadecimal."""
    values = unit.to_dict()
    for name in ("model", "label", "data", "count", "corpus", "settings", "fit"):
        del values[name]  # names, or told in full by a hash or by the config
    if unit.method != UNEDITED:
        values["config"] = config_of(unit).to_dict()
        values["chosen by"] = chosen_by(unit)
    return _hash([values, model, cases, text, code, fit])


def fit_key(unit: Unit, *, model: str, cases: TrainingCases) -> str:
    """SHA-256 of all that a unit's fit depends on; hexadecimal."""
    config = config_for(unit.method, unit.model, {"seed": unit.seed} | settings_of(unit))
    about = unit.method, config.to_dict(), chosen_by(unit), unit.dtype, unit.device
    code = _fitting_code(unit.method, bool(chosen_by(unit)))
    return _hash([about, model, cases.train, cases.validation, code])


def model_hash(name: str, *, dtype: str | None = None, device: str | None = None) -> str:
    """Hash of a model's files, or of its tensors where it is no folder on this machine.

    Raises:
        ModelLoadError: it must be loaded for that, and cannot be.
    """
    folder = pocket_folder(name) if name in POCKET else Path(located(name))
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
        return _hash([(file.name, _file_hash(file, *_stamp(file))) for file in files])
    network = held(name, dtype, device).network
    return _hash([(path, weight_hash(weight)) for path, weight in network.state_dict().items()])


def cases_hash(cases: Sequence[Case]) -> str:
    """Hash of all that the cases say."""
    return _hash(cases)


def text_hash(unit: Unit) -> str:
    """Hash of the text for the second moments; empty where the model writes its own."""
    if unit.method == UNEDITED:
        return ""
    text = text_for(unit.model, unit.corpus)
    content = "" if text is None else read_corpus(text).fingerprint()
    return _hash([content, unit.corpus_tokens or TOKENS])


@functools.cache
def code_hash(method: str, *, located: bool = False) -> str:
    """Hash of the code that computes results with a method.

    Args:
        method: its name.
        located: whether facts choose its layers.
    """
    modules = () if method == UNEDITED else (EDITORS[method].editor.__module__,)
    return _code_hash((*SCORING, *modules, *(LOCATING if located else ())), COMPUTING)


@functools.cache
def _fitting_code(method: str, located: bool) -> str:
    modules = EDITORS[method].editor.__module__, *(LOCATING if located else ())
    return _code_hash(modules, FITTING)


def _code_hash(modules: Iterable[str], jobs: Iterable[str]) -> str:
    """Of some modules with all that they import, and of some jobs alone."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found and name != TABLE and (file := _file(name)) is not None:
            found[name], imported = _read(file)
            waiting += imported
    for job in jobs:
        name = f"errata.jobs.{job}"
        file = _file(name)
        assert file is not None
        found[name], _ = _read(file)
    return _hash(found)


@functools.cache
def _read(file: Path) -> tuple[str, tuple[str, ...]]:
    """What a module does, and what it imports of errata."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return _code(tree), tuple(_imported(tree))


def _file(module: str) -> Path | None:
    """Where a module of errata is; None for what is none, such as a name inside one."""
    path = Path(str(resources.files("errata"))).joinpath(*module.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _imported(tree: ast.Module) -> Iterator[str]:
    """What a module imports of errata; of `from a import b` both a and a.b, if that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("errata."):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _code(tree: ast.Module) -> str:
    """What a module does, without what it says about it."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [s for s in statements if not _is_text(s)])
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _file_hash(file: Path, _size: int, _changed: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _hash(content: Iterable[Any]) -> str:
    text = json.dumps(as_json(content), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
