"""The benchmarks run, and both sides compute the same; never how fast they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run import main
from benchmarks.sections import SECTIONS

OPTIONS = ["--requests", "1", "3", "--cases", "2", "--rounds", "1", "--moment-tokens", "1500"]


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


def test_an_absent_model_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("errata.lm.load.pocket_folder", lambda name: tmp_path / "nothing")
    main(["solve", "--model", "pocket", "--out", str(tmp_path / "out")])
    assert "pocket is skipped" in capsys.readouterr().out
