"""An experiment's file: what it expands into, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ConfigError
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.units import UNEDITED, Unit, field_of

PLAIN = """
models = ["pocket", "pocket-llama"]
count = 20
seeds = [0, 1]
"""
MEMIT = '[[editor]]\nmethod = "memit"\n'


def load(folder: Path, *parts: str) -> Experiment:
    path = folder / "mine.toml"
    path.write_text("\n".join(parts), encoding="utf-8")
    return Experiment.load(path)


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *parts)
    assert "mine.toml" in str(caught.value)
    return str(caught.value)


def values(units: list[Unit], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(unit, name) for name in names) for unit in units]


def test_every_model_seed_and_editor_is_a_unit(tmp_path: Path) -> None:
    made = load(tmp_path, PLAIN, MEMIT, '[[editor]]\nlabel = "R"\nmethod = "rome"\n')
    assert (made.name, made.title) == ("mine", "mine")
    assert values(made.units(), "model", "seed", "label") == [
        (model, seed, label)
        for model in ("pocket", "pocket-llama")
        for seed in (0, 1)
        for label in ("MEMIT", "R")
    ]
    assert {unit.count for unit in made.units()} == {20}


def test_an_experiment_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    load(tmp_path / "experiments", PLAIN, MEMIT)
    assert Experiment.load("mine").path == Path("experiments/mine.toml")
    with pytest.raises(ConfigError, match=r"no experiment 'mien'.*Did you mean 'mine'"):
        Experiment.load("mien")


def test_the_experiments_that_come_along_are_sound() -> None:
    files = sorted((Path(__file__).resolve().parents[3] / "experiments").glob("*.toml"))
    assert files
    for file in files:
        assert Experiment.load(file).units()


def test_settings_for_a_model_add_to_the_editors(tmp_path: Path) -> None:
    settings = 'settings = { relaxation = 0.1, "target.clamp" = 2.0 }\n'
    special = "[editor.for.pocket-llama]\nlayers = [1]\ntarget = { clamp = 3.0 }\n"
    units = load(tmp_path, PLAIN, MEMIT + settings + special).units()
    told = {unit.model: unit.settings for unit in units}
    assert told["pocket"] == {"relaxation": 0.1, "target": {"clamp": 2.0}}
    assert told["pocket-llama"] == {"relaxation": 0.1, "target": {"clamp": 3.0}, "layers": [1]}


def test_facts_may_choose_the_layers(tmp_path: Path) -> None:
    units = load(tmp_path, PLAIN, MEMIT, 'settings = { layers = "auto:tracing" }').units()
    assert {unit.settings["layers"] for unit in units} == {"auto:tracing"}
    told = refused(tmp_path, PLAIN, MEMIT, 'settings = { layers = "auto:guess" }')
    assert "give a list of blocks, or auto:saliency or auto:tracing" in told


def test_an_editor_may_run_on_some_models_only(tmp_path: Path) -> None:
    units = load(tmp_path, PLAIN, MEMIT, 'models = ["pocket"]').units()
    assert {unit.model for unit in units} == {"pocket"}


def test_sweeps_are_crossed(tmp_path: Path) -> None:
    sweep = '[protocol]\nkind = "batch"\n[sweep]\n"protocol.batch" = [1, 4]\n'
    layers = '"settings.layers" = [[0], [0, 1]]\n"settings.target.clamp" = [1.0]\n'
    units = load(tmp_path, 'models = ["pocket"]\ncount = 4', MEMIT, sweep + layers).units()
    assert values(units, "batch", "settings") == [
        (batch, {"layers": layers, "target": {"clamp": 1.0}})
        for batch in (1, 4)
        for layers in ([0], [0, 1])
    ]
    assert field_of(units[0].to_dict(), "protocol.batch") == 1
    assert field_of(units[0].to_dict(), "settings.target.clamp") == 1.0
    assert field_of(units[0].to_dict(), "settings.relaxation") is None


def test_an_editor_has_sweeps_of_its_own(tmp_path: Path) -> None:
    own = MEMIT + 'sweep = { "settings.relaxation" = [0.1, 0.2] }\n'
    units = load(tmp_path, 'models = ["pocket"]', own, '[[editor]]\nmethod = "rome"').units()
    assert [(u.label, u.settings.get("relaxation")) for u in units] == [
        ("MEMIT", 0.1),
        ("MEMIT", 0.2),
        ("ROME", None),
    ]


def test_units_that_a_sweep_does_not_tell_apart_are_done_once(tmp_path: Path) -> None:
    sweep = '[sweep]\n"protocol.kind" = ["single", "batch"]\n"protocol.batch" = [2, 4]\n'
    units = load(tmp_path, 'models = ["pocket"]\ncount = 4', MEMIT, sweep).units()
    assert values(units, "protocol", "batch") == [("single", 1), ("batch", 2), ("batch", 4)]


def test_the_unedited_model_is_a_unit_without_settings(tmp_path: Path) -> None:
    sweep = '[protocol]\nkind = "batch"\n[sweep]\n"protocol.batch" = [2, 4]\n'
    sweep += '"settings.relaxation" = [0.1, 0.2]\n'
    units = load(tmp_path, 'models = ["pocket"]\ncount = 4', MEMIT, '[[editor]]\nmethod = "none"')
    (plain,) = [unit for unit in units.units() if unit.method == UNEDITED]
    assert (plain.label, plain.protocol, plain.settings) == ("unedited", "single", {})
    swept = load(
        tmp_path, 'models = ["pocket"]\ncount = 4', MEMIT, '[[editor]]\nmethod = "none"', sweep
    ).units()
    assert [unit.method for unit in swept].count(UNEDITED) == 1


def test_a_stream_and_its_stops(tmp_path: Path) -> None:
    stream = '[protocol]\nkind = "sequential"\nbatch = 2\nevery = 3\nstop = { perplexity = 2 }\n'
    (unit, *_) = load(tmp_path, PLAIN, MEMIT, stream).units()
    assert (unit.protocol, unit.batch, unit.every, unit.stop) == (
        "sequential",
        2,
        3,
        {"perplexity": 2.0},
    )


def test_a_unit_survives_json(tmp_path: Path) -> None:
    more = 'metrics = ["probability", "teacher-forced"]\ngeneration = true\ngeneration_count = 5\n'
    for unit in load(tmp_path, PLAIN + more, MEMIT, "settings = { layers = [1] }").units():
        assert Unit.from_dict(unit.to_dict()) == unit


def test_sections_of_the_report_are_handed_on(tmp_path: Path) -> None:
    tables = '[[table]]\ntitle = "T"\nanything = 3\n[[table]]\n[[claim]]\ntext = "C"\n'
    assert load(tmp_path, PLAIN, MEMIT, tables).reported == {
        "table": [{"title": "T", "anything": 3}, {}],
        "figure": [],
        "claim": [{"text": "C"}],
    }


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (["count = 3", "models = pocket"], "not valid TOML.*line 2, column 10"),
        (['models = ["pocket"'], "not valid TOML.*end of document"),
        ([PLAIN], r"no \[\[editor\]\]"),
        ([MEMIT], "models.*list of different names"),
        (['models = ["pocket", "pocket"]', MEMIT], "different names"),
        ([PLAIN + "cuont = 3", MEMIT], "no field 'cuont'.*Did you mean 'count'"),
        ([PLAIN.replace("20", "'20'"), MEMIT], "`count` must be a whole number from 1, not '20'"),
        ([PLAIN.replace("20", "0"), MEMIT], "`count` must be a whole number"),
        ([PLAIN.replace("[0, 1]", "[0, 0]"), MEMIT], "`seeds` must be .*different"),
        ([PLAIN + "data = 3", MEMIT], "`data` must be a text"),
        ([PLAIN + "generation = 1", MEMIT], "`generation` is true or false"),
        ([PLAIN + 'metrics = ["probabilty"]', MEMIT], "Did you mean 'probability'"),
        ([PLAIN, '[[editor]]\nlabel = "M"'], "editor 1 needs `method`"),
        ([PLAIN, '[[editor]]\nmethod = "meit"'], "no method 'meit'.*Did you mean 'memit'"),
        ([PLAIN, MEMIT + "clamp = 2"], "editor 1 has no field 'clamp'"),
        ([PLAIN, MEMIT + "settings = { relaxtion = 2 }"], "'MEMIT'.*no .'relaxtion'.*relaxation"),
        ([PLAIN, MEMIT + "settings = { relaxation = -2 }"], "must not be negative"),
        ([PLAIN, MEMIT, MEMIT], "two editors are called 'MEMIT'"),
        ([PLAIN, MEMIT + "[editor.for.poket]"], "'poket' is none of.*Did you mean 'pocket'"),
        ([PLAIN, MEMIT + 'models = ["poket"]'], "'poket' is none of"),
        ([PLAIN, MEMIT, "[protocol]\nkind = 'sequental'"], "Did you mean 'sequential'"),
        ([PLAIN, MEMIT, "[protocol]\nbatch = 4"], "each case is alone"),
        ([PLAIN, MEMIT, "[protocol]\nevery = 4"], 'only kind = "sequential" has `every`'),
        ([PLAIN, MEMIT, "[protocol]\nsize = 4"], "protocol has no field 'size'"),
        (
            [PLAIN, MEMIT, "[protocol]\nkind = 'sequential'\nstop = { ppl = 2 }"],
            "no field 'ppl'; it has perplexity, retention",
        ),
        (
            [PLAIN, MEMIT, "[protocol]\nkind = 'sequential'\nstop = { retention = 'low' }"],
            "retention is a positive number",
        ),
        ([PLAIN, MEMIT, "[protocol]\nkind = 'batch'\nbatch = 21"], "batch of 21.*of 20 cases"),
        ([PLAIN, MEMIT, '[sweep]\n"protocol.bach" = [1]'], "cannot sweep over 'protocol.bach'"),
        ([PLAIN, MEMIT, '[sweep]\n"protocol.batch" = [1, 2]'], "each case is alone"),
        ([PLAIN, MEMIT, '[sweep]\n"protocol.every" = [1, 2]'], "only kind"),
        ([PLAIN, MEMIT, "[sweep]\nseed = [1, 2]"], "`seeds` are lists already"),
        ([PLAIN, MEMIT, "[sweep]\ncount = 3"], "needs a list of values"),
        ([PLAIN, MEMIT, "[sweep]\ncount = [3, 'four']"], "whole number from 1, not 'four'"),
        ([PLAIN, MEMIT, '[sweep]\n"protocol.kind" = ["all"]'], "protocol.kind is one of"),
        ([PLAIN, MEMIT, '[sweep]\n"settings.clmp" = [1]'], "'MEMIT'.*no .'clmp'"),
        ([PLAIN, MEMIT + "sweep = { count = [1] }"], "cannot sweep over 'count'"),
        ([PLAIN, MEMIT, "[model.gpt2]\nlayers = 3"], "'gpt2' is none of"),
        ([PLAIN, MEMIT, "[model.pocket]\nlayer = 3"], "no field 'layer'.*Did you mean 'layers'"),
        ([PLAIN, MEMIT, "[table]\ntitle = 3"], r"written as \[\[table\]\]"),
        (["editor = 3", PLAIN], r"written as \[\[editor\]\]"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, parts: list[str], told: str) -> None:
    message = refused(tmp_path, *parts)
    assert re.search(told, message, re.DOTALL), message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        Experiment.load(path)


def test_variants_are_swept_and_checked(tmp_path: Path) -> None:
    swept = '[sweep]\nvariant = ["fact-erasure", "fact-forcing"]\n'
    none = '[[editor]]\nmethod = "none"\n'
    made = load(tmp_path, PLAIN, MEMIT, none, swept).units()
    assert {unit.variant for unit in made} == {"fact-erasure", "fact-forcing"}
    assert len({(unit.variant, unit.label) for unit in made}) == 4
    assert "'fact-erazure'" in refused(tmp_path, PLAIN, 'variant = "fact-erazure"', MEMIT)
    told = refused(tmp_path, PLAIN, 'variant = "fact-erasure"', '[[editor]]\nmethod = "kn"\n')
    assert "kn cannot do fact-erasure" in told
