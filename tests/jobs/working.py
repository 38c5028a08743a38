"""What tests of experiments share: cases, ordinary text, and units on the tiny trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.jobs.studies.protocols import Outcome
from errata.jobs.studies.units import Unit
from tests.conftest import CAPITALS, SENTENCES, TEMPLATES, WORKING, statements


def write_cases(path: Path) -> Path:
    """Each country gets the next one's capital, in CounterFact's form."""
    countries, capitals = list(CAPITALS), list(CAPITALS.values())
    records = []
    for number, (country, capital) in enumerate(CAPITALS.items()):
        other = countries[(number + 3) % len(countries)]
        records.append(
            {
                "case_id": number,
                "requested_rewrite": {
                    "prompt": TEMPLATES[0],
                    "relation_id": "capital",
                    "subject": country,
                    "target_new": {"str": capitals[(number + 1) % len(capitals)]},
                    "target_true": {"str": capital},
                },
                "paraphrase_prompts": [TEMPLATES[1].replace("{}", country)],
                "neighborhood_prompts": [TEMPLATES[2].replace("{}", other)],
                "generation_prompts": [f"{country} is"],
                "reference_texts": [f"{other} lies on the river.", "The river flows."],
            }
        )
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_corpus(path: Path) -> Path:
    """Ordinary text for the tiny model's second moments."""
    path.write_text("\n".join([*SENTENCES, *statements()] * 2), encoding="utf-8")
    return path


def unit(folder: Path, trained: Path, **fields: Any) -> Unit:
    """A unit on the trained model that takes a second; its files are put into a folder."""
    cases, corpus = write_cases(folder / "cases.json"), write_corpus(folder / "corpus.txt")
    usual: dict[str, Any] = {
        "model": str(trained),
        "label": "MEMIT",
        "method": "memit",
        "settings": WORKING,
        "data": str(cases),
        "count": 4,
        "corpus": str(corpus),
    }
    return Unit(**usual | fields)


def experiment(folder: Path, trained: Path, *more: str) -> Path:
    """The same as a file, with two editors; `more` is put at its end."""
    cases, corpus = write_cases(folder / "cases.json"), write_corpus(folder / "corpus.txt")
    settings = ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in WORKING.items())
    head = [f"models = ['{trained}']", f"data = '{cases}'", f"corpus = '{corpus}'", "count = 4"]
    editors = [
        f'[[editor]]\nmethod = "{method}"\nsettings = {{ {settings} }}'
        for method in ("memit", "emmet")
    ]
    path = folder / "mine.toml"
    path.write_text("\n".join([*head, *more, *editors]), encoding="utf-8")
    return path


def means(outcome: Outcome) -> Mapping[str, float]:
    """Its metrics without their intervals."""
    return {name: estimate.mean for name, estimate in outcome.metrics.items()}
