"""Facts posed as other problems, and the study of all of them by several methods and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ConfigError, DatasetError, RequestError
from errata.jobs import variants
from errata.jobs.locating import locate as job
from errata.jobs.locating.problem_tables import problem_rows
from errata.jobs.locating.problems import Problems, problems
from errata.jobs.locating.report import figure, markdown, render
from errata.jobs.variants import REVERSED, posed
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_requests
from errata.requests import VARIANTS, Case, Request
from tests.conftest import CAPITALS, SENTENCES, TEMPLATES, statements

TEXT = [*SENTENCES, *statements()]
SETTINGS = {
    "memit": {"relaxation": 0.01, "prefixes": [], "target": {"clamp": 5.0, "updates": 15}},
    "ft": {"updates": 6, "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def trained(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def facts() -> list[Case]:
    names = list(CAPITALS)
    return [
        Case(
            Request(TEMPLATES[0], name, CAPITALS[names[i - 1]], CAPITALS[name]),
            paraphrases=(TEMPLATES[1].format(name),),
        )
        for i, name in enumerate(names[:4])
    ]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "tracing-reversal"])
def test_known_facts_are_posed_with_the_variants_target(
    variant: str, trained: LanguageModel
) -> None:
    unknown = [
        Case(Request(TEMPLATES[0], "Spain", "Cairo", "Lima")),
        Case(Request("{} is", "A", "b")),
    ]
    known = facts()
    found, skipped = posed(trained, [*known, *unknown], variant)
    assert [case.request.subject for case in found] == [case.request.subject for case in known]
    assert {case.request.variant for case in found} == {variant}
    wanted = "Paris" if VARIANTS[variant].target == "true" else known[0].request.target
    assert found[0].request.target == wanted
    assert found[0].paraphrases == known[0].paraphrases
    assert any("has probability 0.0" in one.why for one in skipped)
    assert any("is not told" in one.why for one in skipped)


def test_reversal_wants_what_the_model_says_behind_noise(
    trained: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = []

    def said(_: LanguageModel, requests: list[Request], *, new_tokens: int) -> list[str]:
        rooms.append(new_tokens)
        return [" Lima. The" if requests[0].subject == "France" else f" {requests[0].true}."]

    monkeypatch.setattr(variants, "complete_hidden", said)
    found, skipped = posed(trained, facts(), "tracing-reversal")
    assert [case.request.target for case in found] == ["Lima. The"]
    assert len(skipped) == 3 and "behind noise too" in skipped[0].why
    (row,) = encode_requests(trained, [facts()[0].request], target=False)
    assert rooms[0] == max(REVERSED - row.prompt_length, 1)


def test_an_unknown_variant_is_refused(trained: LanguageModel) -> None:
    with pytest.raises(RequestError, match="no variant 'erasure'"):
        posed(trained, facts(), "erasure")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    lines = [json.dumps(case.request.to_dict()) for case in facts()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def study(lm: LanguageModel, source: Path, folder: Path, **other: Any) -> Problems:
    asked: dict[str, Any] = {
        "methods": ["memit", "ft"],
        "variants": ["fact-erasure", "fact-forcing"],
        "settings": SETTINGS,
        "layers": [0, 1],
        "count": 2,
        "seeds": [0, 1],
        "corpus": TEXT,
    }
    return problems(lm, source, folder=folder, **(asked | other))


def test_every_problem_is_done_by_every_method_and_kept_on_the_way(
    trained: LanguageModel, source: Path, tmp_path: Path
) -> None:
    found = study(trained, source, tmp_path / "parts")
    assert [(one.variant, one.method, len(one.facts)) for one in found.studies] == [
        ("fact-erasure", "memit", 4),
        ("fact-erasure", "ft", 4),
        ("fact-forcing", "memit", 4),
        ("fact-forcing", "ft", 4),
    ]
    assert all(max(fact.score) > 0 for one in found.studies for fact in one.facts)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == 8
    before = [part.stat().st_mtime_ns for part in parts]
    (tmp_path / "parts" / "fact-erasure-ft-seed-1.json").unlink()
    assert study(trained, source, tmp_path / "parts").to_dict() == found.to_dict()
    after = [part.stat().st_mtime_ns for part in parts]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    with pytest.raises(DatasetError, match="another study"):
        study(trained, source, tmp_path / "parts", layers=[0])
    back = job.load(job.save(found, tmp_path / "variants.json"))
    assert isinstance(back, Problems) and back.to_dict() == found.to_dict()
    explained, best, by_layer, overall = problem_rows(back)
    assert len(explained[2]) == len(best[2]) == 4 and by_layer[1][2:] == ("0", "1")
    assert all(cell == "\N{EN DASH}" for cell in overall[2][0][2:])  # no neighbours, no overall
    assert len(figure(back).axes) == 3 and "fact-forcing" in render(back)
    page = markdown(back, Path("here/lines.svg"))
    assert "![What is to be done" in page and "(lines.svg)" in page
    assert page.count("| fact-forcing | ft |") == 4


def test_what_cannot_be_done_is_refused_before_anything_is(
    trained: LanguageModel, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="kn cannot do fact-erasure, fact-forcing"):
        study(trained, source, tmp_path, methods=["kn"])
    with pytest.raises(RequestError, match="no variant 'x'"):
        study(trained, source, tmp_path, variants=["x"])
    assert not list(tmp_path.iterdir())
