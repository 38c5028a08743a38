"""Models tuned from the embedded ones: made once by their recipe, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from errata.editors.closed_form.moment_cache import cache_folder
from errata.lm.load import pocket_folder
from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.grow import grow
from errata.pocket.shapes import SHAPES, recipe

logger = logging.getLogger(__name__)

TUNED = tuple(name for name, shape in SHAPES.items() if shape.base)
"""Their names."""


def place(name: str) -> Path:
    """Where a tuned model is kept once it is made: under a hash of all that it depends on.

    That is the base model's files, the facts and the recipe.
    """
    config, encyclopedia = recipe(name), Encyclopedia.load()
    digest = hashlib.sha256(json.dumps([asdict(config), encyclopedia.digest]).encode())
    base = pocket_folder(str(SHAPES[name].base))
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        digest.update(hashlib.sha256((base / file).read_bytes()).digest())
    return cache_folder() / "models" / f"{name}-{digest.hexdigest()[:16]}"


def tuned_folder(name: str) -> Path:
    """The folder of a tuned model, which is made if it is not in the cache: some minutes of work.

    It appears there whole or not at all.

    Raises:
        GrowError: it cannot be made, or not be written.
    """
    folder = place(name)
    if folder.is_dir():
        return folder
    logger.warning("%s is made once, which takes some minutes, and kept in %s.", name, folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        grow(recipe(name), Encyclopedia.load(), aside)
        if not folder.is_dir():
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
