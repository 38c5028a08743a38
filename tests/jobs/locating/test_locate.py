"""Locating: what is found is kept, drawn and reported; layers are recommended from the facts."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch

from errata.errors import ConfigError, DatasetError, RequestError, StorageError
from errata.jobs.edit import edit
from errata.jobs.figures import as_svg
from errata.jobs.layers import NOTE, ending_at, recommend_layers, window_for, with_layers
from errata.jobs.locating import locate as job
from errata.jobs.locating import maps
from errata.jobs.locating.report import Places, averages, by_fact, figure, render, strongest
from errata.jobs.moments import background_for
from errata.jobs.trial import trial
from errata.lm.load import LanguageModel
from errata.locate.saliency import Saliency
from errata.locate.tracing import Noise, Skipped, Trace, Traces
from errata.requests import Case, Probe, Request
from tests.conftest import CAPITALS, SENTENCES, TEMPLATES, WORKING
from tests.locate.planted import LAYERS, planted
from tests.locate.planted import request as planted_request

TEXT = [*SENTENCES, *(f"{t.format(c)} {o}." for t in TEMPLATES for c, o in CAPITALS.items())]
EVIL = "<script>alert('x')</script> {{ 7 * 7 }} $x$"


@pytest.fixture(scope="module")
def trained(trained_folder: Path) -> LanguageModel:
    """A model that knows CAPITALS; these tests leave it as it is."""
    return LanguageModel.load(trained_folder)


def capital(country: str, target: str = "Cairo") -> Case:
    truth = CAPITALS.get(country, "Paris")
    paraphrases = tuple(template.format(country) for template in TEMPLATES[1:])
    neighbours = (Probe(TEMPLATES[0].format("Peru"), "Lima"),)
    request = Request(TEMPLATES[0], country, target, truth)
    return Case(request, paraphrases=paraphrases, neighbours=neighbours)


def small_trace(
    text: str = "Paris", kind: str = "state", layers: int = 3, prompt: str = "The capital of {} is"
) -> Trace:
    """A trace made up: two subject tokens of four."""
    return Trace(
        request=Request(prompt, text, text, text),
        tokens=("The", f" {text}", "\n", " is"),
        subject=(1, 2),
        answer=text,
        predicted=text,
        kind=kind,  # type: ignore[arg-type]
        window=1 if kind == "state" else 3,
        severed=None,
        clean=0.9,
        corrupted=0.1,
        probabilities=tuple(tuple(0.1 + 0.1 * (t + n) for n in range(layers)) for t in range(4)),
        noise=Noise(),
        level=0.3,
        model=text,
    )


def traces(text: str = "Paris", facts: int = 1) -> Traces:
    prompts = ["The capital of {} is", *(f"{{}} is number {n}" for n in range(1, facts))]
    some = [
        small_trace(text, kind, prompt=prompt)
        for prompt in prompts
        for kind in ("state", "mlp", "attention")
    ]
    return Traces(tuple(some), (Skipped(some[0].request, text, f"the model says {text}."),))


def test_tracing_skips_what_the_model_does_not_know(trained: LanguageModel) -> None:
    wrong = Case(Request(TEMPLATES[0], "Spain", "Cairo", "Lima"))
    found = job.tracing(trained, [capital("France"), wrong, capital("Japan")])
    assert [len(fact) for fact in by_fact(found)] == [3, 3]
    assert [fact[0].request.subject for fact in by_fact(found)] == ["France", "Japan"]
    (skipped,) = found.skipped
    assert "Madrid" in skipped.predicted and "Lima" in skipped.why
    clean, corrupted = job.total_effect(found)
    assert clean > 0.9 > corrupted


def test_severed_runs_restore_states_alone(trained: LanguageModel) -> None:
    found = job.tracing(trained, [capital("France")], severed="mlp")
    assert [(trace.kind, trace.severed) for trace in found.traces] == [("state", "mlp")]


def test_nothing_known_is_an_error_that_says_what_the_model_says(trained: LanguageModel) -> None:
    wrong = [Case(Request(TEMPLATES[0], "Spain", "Cairo", "Lima"))]
    for find in (job.tracing, job.neurons):
        with pytest.raises(RequestError, match="Madrid"):
            find(trained, wrong)


def test_saliency_with_and_without_neutral_facts(trained: LanguageModel, tmp_path: Path) -> None:
    cases = [capital("France"), capital("Japan")]
    assert job.salient(trained, cases).standardised is None
    path = tmp_path / "neutral.jsonl"
    rows = [capital(name).request.to_dict() for name in ("Peru", "Cuba", "Egypt")]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = job.salient(trained, cases, neutral=path)
    assert (found.examples, found.neutral) == (2, 3)
    assert found.standardised is not None and min(found.standardised) > 0


def test_neurons_are_found_with_all_prompts_and_checked_on_others(trained: LanguageModel) -> None:
    wrong = Case(Request(TEMPLATES[0], "Spain", "Cairo", "Lima"))
    found = job.neurons(trained, [capital("France"), wrong], factor=3.0)
    (fact,) = found.facts
    assert fact.neurons.prompts == tuple(template.format("France") for template in TEMPLATES)
    assert fact.neurons.answer == "Paris" and fact.neurons.found
    assert [r.answer for r in fact.effect.others] == ["Lima"]
    assert fact.effect.factor == 3.0
    assert all(0 <= n.layer < found.layers and 0 <= n.index < found.width for n in fact.neurons)
    assert "Madrid" in found.skipped[0].predicted


def test_neurons_are_those_of_what_the_model_says(trained: LanguageModel) -> None:
    found = job.neurons(trained, [Case(Request(TEMPLATES[0], "France", "Cairo"))])
    assert found.facts[0].neurons.answer == "Paris"


def test_facts_by_hand_need_no_answer(trained: LanguageModel) -> None:
    (case,) = job.facts_for(trained, subject="France", prompt="The capital of France is")
    assert case.request == Request("The capital of {} is", "France", "Paris")
    (case,) = job.facts_for(trained, subject="France", prompt="{} is", target="Rome")
    assert (case.request.target, case.request.true) == ("Rome", None)
    (case,) = job.facts_for(trained, subject="France", prompt="{} is", true="Lima")
    assert (case.request.target, case.request.true) == ("Lima", "Lima")


def test_facts_must_be_named_where_they_are_not_known(trained: LanguageModel) -> None:
    with pytest.raises(RequestError, match="--cases"):
        job.facts_for(trained)


def test_results_are_read_back(trained: LanguageModel, tmp_path: Path) -> None:
    cases = [capital("France")]
    for find in (job.tracing, job.salient, job.neurons):
        found = find(trained, cases)
        path = job.save(found, tmp_path / "found.json")
        assert job.load(path) == found
        assert "torch" in json.loads(path.read_text(encoding="utf-8"))["versions"]


@pytest.mark.parametrize(
    "text", ["", "{}", '{"errata locate": "else"}', '{"errata locate": "tracing", "result": []}']
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=r"x\.json"):
        job.load(path)
    with pytest.raises(DatasetError, match="absent"):
        job.load(tmp_path / "absent.json")


# Pictures


def test_a_map_stars_the_subject_and_says_its_values() -> None:
    drawn = maps.heat_maps([small_trace(kind=k) for k in ("state", "mlp", "attention")])
    first = drawn.axes[0]
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == ["The", "Paris*", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}*", "is"]
    assert [text.get_text() for text in first.texts][:3] == [".10", ".20", ".30"]
    found: list[Any] = [axes.collections[0] for axes in drawn.axes[:3]]
    assert [mesh.get_cmap().name for mesh in found] == ["Purples", "Greens", "Reds"]
    assert {mesh.get_clim() for mesh in found} == {(0.1, 0.9)}


def test_a_deep_map_has_no_room_for_numbers() -> None:
    drawn = maps.heat_maps([small_trace(layers=maps.NUMBERED + 1)])
    assert not drawn.axes[0].texts


@pytest.mark.parametrize("name", sorted(maps.MAPS.values()))
def test_maps_are_ordered_by_lightness(name: str) -> None:
    """Readable without colour vision: darker is always more."""
    shades = matplotlib.colormaps[name](torch.linspace(0, 1, 32).numpy())[:, :3]
    lightness = shades @ [0.2126, 0.7152, 0.0722]
    assert all(b < a for a, b in zip(lightness, lightness[1:], strict=False))


def test_averages_have_a_line_for_each_class_of_tokens() -> None:
    found = averages(traces(facts=4))
    drawn = maps.average_lines(found)
    for axes, one in zip(drawn.axes, found, strict=True):
        shown = [line for line in axes.lines if line.get_label() in one.classes]
        # No fact has a middle subject token, or one between the first after it and the last.
        assert len(shown) == len(one.classes) - 2
        last: Any = next(line for line in shown if line.get_label() == "last subject token")
        assert list(last.get_ydata()) == pytest.approx([0.2, 0.3, 0.4])
    assert "<svg" in as_svg(maps.average_maps(found))


def test_the_strongest_places_are_named() -> None:
    (best, *_) = strongest(traces())
    assert best == ("one state", "is", "2", "0.500")
    averaged = strongest(traces(facts=3), count=1)
    # The token after the subject is the last one here.
    assert [row[1] for row in averaged] == ["first subsequent token"] * 3
    assert averaged[0][3] == "0.50 [0.50, 0.50]"


# Reports


class Tags(HTMLParser):
    """Collects tags and what they load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("facts", [1, 2])
def test_a_report_escapes_everything_and_loads_nothing(facts: int) -> None:
    page = render(traces(EVIL, facts))
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags and "svg" in tags.tags
    assert tags.loads == []
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    found = re.findall(r'\bid="([^"]+)"', page)
    assert len(found) == len(set(found))


def test_a_report_has_the_numbers_behind_each_picture(trained: LanguageModel) -> None:
    page = render(traces())
    assert "0.4000" in page and "the model says Paris." in page
    assert "gradient" in render(job.salient(trained, [capital("France")]))
    assert "Knowledge neurons of 1 fact" in render(job.neurons(trained, [capital("France")]))


def test_places_are_found_wanting_before_the_work(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for places in (
        Places(blocked / "x.json"),
        Places(report=blocked / "x.html"),
        Places(figure=tmp_path / "x.gif"),
    ):
        with pytest.raises(StorageError):
            places.check()
    places = Places(tmp_path / "x.json", tmp_path / "x.svg", tmp_path / "x.html")
    places.check()
    places.write(traces())
    assert job.load(tmp_path / "x.json") == traces()
    ElementTree.parse(tmp_path / "x.svg")
    assert str(figure(traces()).get_label()).startswith("The capital of Paris is")


# Layers


def test_layers_end_at_the_peak() -> None:
    assert ending_at(5, 3) == (3, 4, 5)
    assert ending_at(5, 1) == (5,)
    assert ending_at(1, 3) == (0, 1, 2)  # moved up where the model begins


def test_windows_follow_the_papers() -> None:
    for layers, window in ((1, 1), (2, 1), (8, 3), (12, 4), (28, 10), (48, 10)):
        lm: Any = SimpleNamespace(layers=layers)
        assert window_for(lm) == window


@pytest.mark.parametrize("layer", [1, 3])
def test_tracing_recommends_the_layer_that_holds_the_facts(layer: int) -> None:
    facts = [planted_request("Ada Bell"), planted_request("Ella Frost", "Rome")]
    unknown = Request("the birthplace of {} is", "Liam Moor", "Rome", "Lima")
    found = recommend_layers(planted(layer), [*facts, unknown], "tracing")
    assert len(found.profile) == LAYERS and max(found.profile) > 0.5
    # A window of two stands for its layer and the one before.
    assert found.layers[0] in (layer, layer + 1)
    assert found.profile[layer] == max(found.profile)
    assert "2 facts" in found.why and "1 fact that" in found.why


def test_saliency_recommends_its_own_best_layer(trained: LanguageModel) -> None:
    cases = [capital("France"), capital("Japan")]
    (best,) = job.salient(trained, cases).best()
    found = recommend_layers(trained, [case.request for case in cases], "saliency", 2)
    assert found.layers == ending_at(best, 2)
    assert str(best) in found.why


def test_unknown_facts_ask_for_layers_by_name(trained: LanguageModel) -> None:
    wrong = [Request(TEMPLATES[0], "Spain", "Cairo", "Lima")]
    with pytest.raises(RequestError, match="Name layers instead"):
        recommend_layers(trained, wrong, "tracing")


def test_bad_ways_are_refused(trained: LanguageModel) -> None:
    one = [capital("France").request]
    with pytest.raises(ConfigError, match="auto:saliency and auto:tracing"):
        recommend_layers(trained, one, "magic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="9 of the 4"):
        recommend_layers(trained, one, "saliency", 9)
    with pytest.raises(RequestError, match="no fact"):
        recommend_layers(trained, [], "saliency")
    with pytest.raises(ConfigError, match="give a list"):
        with_layers(trained, one, "memit", {"layers": "first"}, background_for(trained, TEXT))


def test_as_many_layers_as_the_method_edits(trained: LanguageModel) -> None:
    background = background_for(trained, TEXT)
    one = [capital("France").request]
    for method, count in (("rome", 1), ("memit", 2)):
        values, advice = with_layers(
            trained, one, method, {"layers": "auto:saliency", "seed": 3}, background
        )
        assert advice is not None and len(values["layers"]) == count
        assert values["seed"] == 3
    named = {"layers": [2]}
    assert with_layers(trained, one, "memit", named, background) == (named, None)


def test_an_edit_tells_how_its_layers_were_chosen(trained: LanguageModel) -> None:
    settings = {**WORKING, "layers": "auto:tracing"}
    change = edit(trained, [capital("France")], method="rome", settings=settings, corpus=TEXT)
    note = change.record.notes[NOTE]
    assert note["how"] == "tracing" and len(note["profile"]) == 4
    assert change.record.config["layers"] == note["layers"]
    assert change.paths == tuple(trained.mlp_out_path(layer) for layer in note["layers"])


def test_a_trial_tells_how_its_layers_were_chosen(trained: LanguageModel) -> None:
    settings = {**WORKING, "layers": "auto:saliency"}
    found = trial(trained, [capital("France")], method="rome", settings=settings, corpus=TEXT)
    assert found.advice.startswith("auto:saliency: ")


def test_a_figure_of_saliency_marks_the_largest() -> None:
    found = Saliency("m", 2, 3, (), (0.1, 0.5, 0.2), (3.0, 1.0, 2.0))
    naive, standardised = figure(found).axes
    for axes, best in ((naive, 1), (standardised, 0)):
        shades = [patch.get_facecolor() for patch in axes.patches]
        assert shades.count(shades[best]) == 1
    assert not math.isnan(found.layers[0])
