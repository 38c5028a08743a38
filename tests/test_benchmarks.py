"""The benchmarks run, and both sides compute the same; never how fast they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cluster
from benchmarks.hypernet import AT_ONCE, HYPERNET_SECTIONS
from benchmarks.run import main
from benchmarks.sections import SECTIONS
from benchmarks.tracing import PROMPTS, TRACING_SECTIONS

OPTIONS = ["--requests", "1", "3", "--cases", "2", "--rounds", "1", "--moment-tokens", "1500"]


FEW = ["--requests", "4", "--cases", "4", "--moment-tokens", "2000"]


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    main([*arguments, *OPTIONS, "--out", str(out)])
    rows: list[dict[str, Any]] = json.loads((out / "benchmarks.json").read_text())
    return rows


def test_ours_and_serial_agree(tmp_path: Path) -> None:
    rows = run(tmp_path, *SECTIONS, "--model", "tiny-gpt2")
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert all(row["agrees"] for row in rows), [r for r in rows if not r["agrees"]]
    page = (tmp_path / "benchmarks.md").read_text()
    assert all(f"| {name} | tiny-gpt2 |" in page for name in SECTIONS)


def test_another_family_and_the_gpu_sections(tmp_path: Path) -> None:
    sections = ["targets", "keys", "edits", "second-moments"]
    rows = run(tmp_path, *sections, "--model", "tiny-llama")
    assert list(dict.fromkeys(row["section"] for row in rows)) == sections
    assert all(row["agrees"] in (True, None) for row in rows)


def test_the_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    rows = run(tmp_path, "store", "--model", "tiny-gpt2")
    assert rows and all(row["agrees"] and " kB a unit" in row["note"] for row in rows)


def test_tracing_equals_a_pass_for_each_place(tmp_path: Path) -> None:
    rows = run(tmp_path, *TRACING_SECTIONS, "--model", "tiny-gpt2")
    assert [row["section"] for row in rows] == [n for n in TRACING_SECTIONS for _ in range(PROMPTS)]
    assert all(row["difference"] < 1e-5 for row in rows)


def test_saliency_and_tracing_choose_for_the_same_facts(tmp_path: Path) -> None:
    (row,) = run(tmp_path, "choosing", "--model", "tiny-gpt2")
    assert row["agrees"] is None and "3 of 3 facts traced" in row["note"]
    assert row["seconds"] > 0 and row["serial_seconds"] > 0


def test_a_step_of_fitting_has_the_references_gradients(tmp_path: Path) -> None:
    *fitting, one, many = run(tmp_path, *HYPERNET_SECTIONS, "--model", "tiny-gpt2")
    assert [row["what"] for row in fitting] == [
        f"10 edits a step, {at_once} at once" for at_once in AT_ONCE
    ]
    assert all(row["agrees"] and row["difference"] < 1e-3 for row in fitting)
    assert one["what"] == "1 edit" and many["what"] == "64 edits at once"
    assert "MEND over FT of 25 updates" in many["note"] and many["seconds"] > 0


def test_an_absent_model_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("errata.lm.load.pocket_folder", lambda name: tmp_path / "nothing")
    main(["solve", "--model", "pocket", "--out", str(tmp_path / "out")])
    assert "pocket is skipped" in capsys.readouterr().out


def test_costs_of_a_large_model_are_reckoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "scale.md"
    around = "<!-- costs: written by benchmarks/cluster.py -->{}<!-- end of costs -->\nafter"
    page.write_text(around.format("old"))
    monkeypatch.setattr(cluster, "PAGE", page)
    cluster.main(["--costs", "--model", "tiny-gpt2", *FEW, "--write"])
    told = capsys.readouterr().out
    assert page.read_text() == around.format(f"\n{told}")
    study = next(line for line in told.splitlines() if line.startswith("| **the study**"))
    alone, eight = (float(cell.split()[0]) for cell in study.split("|")[4:6])
    assert alone > 0 and eight > 0
    assert told.count("%") == 4  # shares of the peak that were measured


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_find_what_one_process_finds(capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main(["--model", "tiny-gpt2", *FEW])
    rows = [line for line in capsys.readouterr().out.splitlines() if "cluster-" in line]
    assert len(rows) == len(cluster.MAPS) * len(cluster.WORKERS)
    assert not any("more than" in row for row in rows), rows
