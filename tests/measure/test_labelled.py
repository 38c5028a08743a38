"""Texts with labels: every published form is read, and every complaint names its place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from errata.errors import DatasetError
from errata.measure.datasets import read, read_labelled
from errata.measure.datasets.labelled import Labelled

FEVER = {"id": 1, "verifiable": "VERIFIABLE", "label": "SUPPORTS", "claim": "Rome is in Italy."}
KILT = {"id": "1", "input": "Rome is in Italy.", "output": [{"answer": "SUPPORTS"}], "meta": {}}
AUGMENTED = KILT | {
    "logit": 2.5,
    "prediction": "SUPPORTS",
    "alternatives": ["REFUTES"],
    "filtered_rephrases": ["Rome lies in Italy.", "In Italy there is Rome."],
}
MULTINLI = {
    "gold_label": "entailment",
    "sentence1": "Rome is the capital of Italy. ",
    "sentence2": "Rome is in Italy.",
    "pairID": "1e",
}
MULTINLI_HUB = {"premise": MULTINLI["sentence1"], "hypothesis": MULTINLI["sentence2"], "label": 0}
DIALOGUENLI = {
    "id": "d1",
    "label": "negative",
    "sentence1": "i have two dogs.",
    "sentence2": "i never had a pet.",
    "triple1": ["i", "have_pet", "dog"],
    "dtype": "(um, p)",
}


def lines(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records), encoding="utf-8")
    return path


def table(folder: Path, text: str) -> Path:
    path = folder / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "name", "example"),
    [
        (FEVER, "FEVER", Labelled("Rome is in Italy.", "SUPPORTS")),
        (KILT, "FEVER", Labelled("Rome is in Italy.", "SUPPORTS")),
        (
            AUGMENTED,
            "FEVER",
            Labelled(
                "Rome is in Italy.", "SUPPORTS", ("Rome lies in Italy.", "In Italy there is Rome.")
            ),
        ),
        (
            MULTINLI,
            "MultiNLI",
            Labelled(
                "premise: Rome is the capital of Italy. hypothesis: Rome is in Italy.", "entailment"
            ),
        ),
        (
            MULTINLI_HUB,
            "MultiNLI",
            Labelled(
                "premise: Rome is the capital of Italy. hypothesis: Rome is in Italy.", "entailment"
            ),
        ),
        (
            DIALOGUENLI,
            "DialogueNLI",
            Labelled("premise: i have two dogs. hypothesis: i never had a pet.", "negative"),
        ),
    ],
)
def test_every_form_is_told_from_its_first_record(
    tmp_path: Path, record: dict[str, Any], name: str, example: Labelled
) -> None:
    assert read_labelled(lines(tmp_path, record)) == (name, [example])


def test_dialoguenli_is_one_list_whatever_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "dialogue_nli_dev.jsonl"
    path.write_text(json.dumps([DIALOGUENLI]))
    name, (example,) = read_labelled(path)
    assert (name, example.label) == ("DialogueNLI", "negative")


def test_empathetic_dialogues_in_both_forms(tmp_path: Path) -> None:
    published = (
        "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
        "hit:0_conv:1,1,sentimental,I remember_comma_ as a child_comma_ the sea.,1,Oh,5|5,\n"
        "hit:0_conv:1,2,sentimental,I remember_comma_ as a child_comma_ the sea.,0,Ah,5|5,\n"
        'hit:1_conv:3,1,proud,"He said ""bravo""",1,Yes,5|5,\n'
    )
    name, examples = read_labelled(table(tmp_path, published))
    assert name == "EmpatheticDialogues"
    assert examples == [
        Labelled("I remember, as a child, the sea.", "sentimental"),
        Labelled('He said "bravo"', "proud"),
    ]
    recoded = "conv_id,utterance_idx,prompt,utterance,label\nhit:3_conv:6,1,A tire burst,Oh,2\n"
    assert read_labelled(table(tmp_path, recoded))[1] == [Labelled("A tire burst", "2")]


def test_persuasion_names_strategies_or_speakers(tmp_path: Path) -> None:
    annotated = (
        ",Unit,Turn,B4,B2,er_label_1,ee_label_1\n"
        "0,Every cent helps a child.,0,0,d1,emotion-appeal,\n"
        "1,How?,0,1,d1,,ask\n"
        "2,Bye.,1,0,d1,,\n"
    )
    assert read_labelled(table(tmp_path, annotated)) == (
        "PersuasionForGood",
        [Labelled("Every cent helps a child.", "emotion-appeal")],
    )
    full = ',Unit,Turn,B4,B2\n0,Hello.,0,0,d1\n1,"Hi, you.",0,1,d1\n'
    assert read_labelled(table(tmp_path, full))[1] == [
        Labelled("Hello.", "persuader"),
        Labelled("Hi, you.", "persuadee"),
    ]


def test_what_cannot_be_used_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path, FEVER, FEVER, FEVER | {"label": "NOT ENOUGH INFO", "claim": "Who knows"})
    with caplog.at_level(logging.WARNING):
        assert len(read_labelled(path)[1]) == 1
    assert "skipped 2 of 3" in caplog.text and "not enough information" in caplog.text
    assert read_labelled(lines(tmp_path, MULTINLI, MULTINLI | {"gold_label": "-"}))[1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (FEVER | {"label": "TRUE"}, "line 3: a claim SUPPORTS or REFUTES, not 'TRUE'"),
        ({"claim": "x"}, "line 3 has no 'label'"),
        (FEVER | {"claim": " "}, "line 3: the request's 'subject' must be a non-empty text"),
        (FEVER | {"claim": 5}, "line 3: 'claim' must be text, got int"),
        ({"input": "x", "output": []}, "line 3: 'output' must hold the answer"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = lines(tmp_path, FEVER, record)
    with pytest.raises(DatasetError, match=message) as error:
        read_labelled(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",Unit,Turn,B4,B2\n0,Hello.,0,0,d1\n1,Hi,0,9,d1\n", "line 3: 'B4' is 0 .* not 9"),
        (",Unit,Turn,B4,B2\n0,Hello.\n", "line 2 has 2 fields; its head has 5"),
        (",Unit,Turn,B4,B2\n", "holds no record"),
        ("conv_id,prompt\na,It rains\n", "line 2 has no 'label'"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_labelled(table(tmp_path, text))


def test_labels_are_not_edits_and_edits_have_no_labels(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="FEVER: texts with labels.*errata make-edits"):
        read(lines(tmp_path, AUGMENTED))
    with pytest.raises(DatasetError, match="no known data set; its keys are .'src'"):
        read_labelled(lines(tmp_path, {"src": "Who?"}))


def test_rows_of_the_hub_are_read_like_a_file(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines(tmp_path, FEVER, FEVER | {"claim": "Rome is in Spain.", "label": "REFUTES"})
    name, examples = read_labelled(f"hub:{tmp_path}::train")
    assert name == "FEVER" and [e.label for e in examples] == ["SUPPORTS", "REFUTES"]
    with pytest.raises(DatasetError, match="cannot read the data set 'hub:no/such'"):
        read_labelled("hub:no/such")


@pytest.mark.parametrize(
    ("name", "count", "labels"),
    [
        ("fever/paper_dev.jsonl", 6512, 2),
        ("empathetic/fixed_valid.csv", 2754, 32),
        ("persuasion/full_dialog.csv", 19947, 2),
    ],
)
def test_published_files(shared: Path, name: str, count: int, labels: int) -> None:
    path = shared / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    _, examples = read_labelled(path)
    assert len(examples) == count
    assert len({example.label for example in examples}) == labels
