from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from errata.errors import DatasetError
from errata.measure import datasets
from errata.measure.datasets import counterfact, scen, wikibio, wikitext, zsre
from errata.requests import Probe


def original(**extra: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "{} is the capital of",
        "relation_id": "P1376",
        "target_new": {"str": "Italy", "id": "Q38"},
        "target_true": {"str": "France", "id": "Q142"},
        "subject": "Paris",
    }
    return {"case_id": 7, "requested_rewrite": rewrite, **extra}


def compact(**extra: Any) -> dict[str, Any]:
    return {
        "case_id": 3,
        "prompt": "Paris is the capital of",
        "subject": "Paris",
        "target_new": "Italy",
        "ground_truth": "France",
        "rephrase_prompt": "The Seine flows through Paris, the capital of",
        "locality_prompt": "Lyon is a city in",
        "locality_ground_truth": "France",
        **extra,
    }


def question(**extra: Any) -> dict[str, Any]:
    return {
        "subject": "Paris",
        "src": "Which country is Paris the capital of?",
        "pred": "Spain",
        "rephrase": "Paris is whose capital?",
        "alt": "Italy",
        "answers": ["France", "the French Republic"],
        "loc": "nq question: who wrote faust",
        "loc_ans": "Goethe",
        **extra,
    }


def write(folder: Path, content: Any) -> Path:
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_original_counterfact(tmp_path: Path) -> None:
    record = original(
        paraphrase_prompts=["Paris rules"],
        neighborhood_prompts=["Lyon is in", "Nice is in"],
        attribute_prompts=["Turin is in"],
        generation_prompts=["Paris lies", "Paris lies"],
        same_subject_prompts=[{"prompt": "Paris lies on the", "target": "Seine"}],
        reference_texts=["Italy is a country."],
    )
    (case,) = counterfact.read(write(tmp_path, [record]))
    assert (case.case_id, case.relation) == ("7", "P1376")
    assert case.request.text == "Paris is the capital of"
    assert (case.request.target, case.request.true) == ("Italy", "France")
    assert case.paraphrases == ("Paris rules",)
    assert case.neighbours == (Probe("Lyon is in", "France"), Probe("Nice is in", "France"))
    assert case.attributes == (Probe("Turin is in", "Italy"),)
    assert case.same_subject == (Probe("Paris lies on the", "Seine"),)
    assert case.generation == ("Paris lies", "Paris lies")
    assert case.references == ("Italy is a country.",)


def test_compact_counterfact(tmp_path: Path) -> None:
    (case,) = counterfact.read(write(tmp_path, [compact()]))
    assert case.request.prompt == "{} is the capital of"
    assert case.paraphrases == ("The Seine flows through Paris, the capital of",)
    assert case.neighbours == (Probe("Lyon is a city in", "France"),)
    assert not case.attributes and not case.same_subject


def test_a_record_without_extras_is_a_case_without_them() -> None:
    (case,) = counterfact.cases([original()])
    assert not (case.paraphrases or case.neighbours or case.generation or case.references)


def test_zsre(tmp_path: Path) -> None:
    (case,) = zsre.read(write(tmp_path, [question()]))
    assert case.request.prompt == "Which country is {} the capital of?"
    assert (case.request.target, case.request.true) == ("Italy", "France")
    assert case.paraphrases == ("Paris is whose capital?",)
    assert case.neighbours == (Probe("nq question: who wrote faust?", "Goethe"),)


def test_zsre_as_mend_publishes_it(tmp_path: Path) -> None:
    records = [
        {
            "id": str(number),
            "input": f"Where is {city}?",
            "output": [{"answer": "Italy"}],
            "prediction": "Italy",
            "alternatives": ["Spain", "Peru"],
            "filtered_rephrases": [f"{city} is where?"] if city != "Bari" else [],
        }
        for number, city in enumerate(("Rome", "Bari", "Pisa"))
    ]
    path = tmp_path / "zsre.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    rome, pisa = datasets.read(path)  # Bari has no other wording
    assert (rome.request.text, rome.request.target) == ("Where is Rome?", "Spain")
    assert rome.request.true == "Italy" and rome.paraphrases == ("Rome is where?",)
    assert rome.neighbours == (Probe("Where is Pisa?", "Italy"),)
    assert pisa.neighbours == (Probe("Where is Rome?", "Italy"),)


def biography(**extra: Any) -> dict[str, Any]:
    return {
        "prompt": "This is a Wikipedia passage about ada lovelace. ada lovelace was a countess.",
        "subject": "ada lovelace",
        "target_new": "She wrote the first program.",
        "locality_prompt": "Opening hours: ",
        "locality_ground_truth": "nine to five.",
        **extra,
    }


def test_wikibio_puts_the_slot_where_the_passage_opens(tmp_path: Path) -> None:
    (case,) = datasets.read(write(tmp_path, [biography()]))
    assert case.request.prompt.startswith("This is a Wikipedia passage about {}. ada")
    assert case.request.text == biography()["prompt"]
    assert case.neighbours == (Probe("Opening hours: ", "nine to five."),)
    with pytest.raises(DatasetError, match="the new target is empty"):
        wikibio.read(write(tmp_path, [biography(target_new="")]))


def test_scen_texts_for_perplexity(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "Ada was born.", "labels": "She wrote.", "concept": "ada"}])
    assert scen.read_accurate(path) == [Probe("Ada was born.", "She wrote.")]
    assert scen.read_texts(path) == ["Ada was born."]
    with pytest.raises(DatasetError, match="record 1 has no 'labels'"):
        scen.read_accurate(write(tmp_path, [{"text": "Ada was born."}]))


def test_wikitext_becomes_continuations(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(60)]
    path = tmp_path / "wiki.test.txt"
    path.write_text(
        "\n = Ada = \n \n "
        + " ".join(words)
        + " \n too short . \n <unk> "
        + " ".join(words)
        + " \n "
        + " ".join(words[::-1])
        + " \n",
        encoding="utf-8",
    )
    first, second = datasets.read(path)
    assert first.request.text == " ".join(words[:40])
    assert first.request.target == " ".join(words[40:50])
    assert first.paraphrases == (" ".join(words[10:40]), " ".join(words[20:40]))
    assert first.neighbours == (Probe(second.request.text, second.request.target),)
    assert datasets.read(path, 1) == [first]
    path.write_text("short\n")
    with pytest.raises(DatasetError, match="has 0 passages of 50 words"):
        wikitext.read(path)


def test_wikitext_tokens_become_ordinary_text() -> None:
    line = ' The " big " red @-@ tipped crab ( 4 @,@ 386 t ) is n\'t rare , he said : 3 @.@ 1 . '
    assert wikitext.plain(line) == (
        'The "big" red-tipped crab (4,386 t) isn\'t rare, he said: 3.1.'
    )


def test_unusable_records_are_counted_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    twice = compact(prompt="Paris, Paris is in")
    absent = compact(prompt="The city is in")
    with caplog.at_level(logging.WARNING):
        cases = counterfact.cases([twice, compact(), absent, absent], source="mine")
    assert [case.case_id for case in cases] == ["3"]
    assert "mine: skipped 3 of 4" in caplog.text
    assert "1 because the subject is in the prompt more than once" in caplog.text
    assert "2 because the subject is not in the prompt" in caplog.text
    with pytest.raises(DatasetError, match="no record is usable: 1 because the new target"):
        zsre.cases([question(alt=" ")])


def test_limit_counts_cases_and_reads_no_further() -> None:
    records: list[Any] = [compact(prompt="nobody"), compact(), compact(case_id=4), "not a record"]
    assert [case.case_id for case in counterfact.cases(records, limit=2)] == ["3", "4"]


def test_the_format_is_told_from_the_first_record(tmp_path: Path) -> None:
    for record in (original(), compact(), question()):
        (case,) = datasets.read(write(tmp_path, [record]))
        assert case.request.target == "Italy"
    with pytest.raises(DatasetError, match=r"no known data set; its keys are \['x'\]"):
        datasets.read(write(tmp_path, [{"x": 1}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"case_id": 1},\n {"prompt": "cut', "line 2, column 13: not valid JSON"),
        ("", "line 1, column 1: not valid JSON"),
        ({"a": 1}, "must hold a JSON list of records, got dict"),
        ([], "got an empty list"),
        ([original(), 5], "record 2 must be an object, got int"),
        ([original(), {"case_id": 1}], "record 2 has no 'prompt'"),
        ([original(requested_rewrite={"prompt": "x"})], "'requested_rewrite' has no 'target_new'"),
        ([original(paraphrase_prompts="one")], "'paraphrase_prompts' must be a list, got str"),
        ([original(attribute_prompts=["a", 2])], r"'attribute_prompts\[1\]' must be text, got int"),
        ([original(same_subject_prompts=[{"prompt": "a"}])], r"same_subject_prompts\[0\]' has no"),
        ([compact(subject=None)], "'subject' must be text, got NoneType"),
    ],
)
def test_bad_counterfact_is_refused_with_its_place(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DatasetError, match=message) as error:
        counterfact.read(path)
    assert str(path) in str(error.value)


def test_a_prompt_without_a_slot_is_refused_with_its_record() -> None:
    broken = original()
    broken["requested_rewrite"]["prompt"] = "Paris is the capital of"
    with pytest.raises(DatasetError, match="CounterFact, record 1: .* 0 slots"):
        counterfact.cases([broken])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alt": 3}, "record 1: 'alt' must be text"),
        ({"answers": []}, "record 1: 'answers' must hold the true answer"),
        ({"answers": "France"}, "'answers' must be a list"),
    ],
)
def test_bad_zsre_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        zsre.cases([question(**change)])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read"):
        counterfact.read(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(DatasetError, match="cannot read"):
        zsre.read(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wikitext2/wiki.valid.txt", 134),
        ("counterfact/counterfact_500.json", 500),
        ("counterfact/counterfact-val.json", 1919),
        ("zsre/zsre_mend_train-1k.json", 998),  # two have an empty new answer
    ],
)
def test_published_files(shared: Path, name: str, count: int) -> None:
    path = shared / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    cases = datasets.read(path)
    assert len(cases) == count
    for case in cases:
        assert case.request.subject in case.request.text
        assert case.paraphrases and case.neighbours


def test_published_wikibio_and_scen(shared: Path) -> None:
    folder = shared / "data"
    if not (folder / "wikibio").is_dir() or not (folder / "scen").is_dir():
        pytest.skip("WikiBio or SCEN is absent")
    for name, count in (("edit", 600), ("train", 306)):
        cases = datasets.read(folder / f"wikibio/hallucination-{name}.json")
        assert len(cases) == count and sum(bool(case.neighbours) for case in cases) > count - 10
    assert len(scen.read_accurate(folder / "scen/hall_accurates.json")) == 516
    assert len(scen.read_texts(folder / "scen/hall_open_webtext.json")) == 200
