"""SaLEM: saliency over the editing set picks the blocks; the rest is MEND's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errata.editors.background import Background
from errata.editors.fitted import load_editor
from errata.editors.hypernet.salem import Salem, SalemConfig, editing_set_saliency
from errata.errors import ConfigError, FitError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.locate.saliency import Saliency, saliency
from errata.requests import Request
from tests.conftest import TEMPLATES
from tests.editors.hypernet.capitals import QUICK, capital_cases, divided

REQUEST = Request(TEMPLATES[0], "France", "Rome", "Paris")
SHORT = QUICK | {"training": {"steps": 2, "validate_every": 1, "validation": 2}}


def salem(**settings: object) -> Salem:
    return Salem(SalemConfig.from_dict(SHORT | settings), Background())


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def plain_profile(lm: LanguageModel) -> list[float]:
    """Equations 2 to 5 for each block's MLP, one example at a time."""
    totals = [0.0] * lm.layers
    examples = [
        Example(prompt, case.request.target)
        for case in divided().train
        for prompt in (case.request.text, *case.paraphrases)
    ]
    for one in examples:
        lm.network.zero_grad(set_to_none=True)
        torch.autograd.backward(losses(lm, [one]).sum())
        for layer in range(lm.layers):
            gradients = [lm.mlp_in(layer).weight.grad, lm.mlp_out(layer).weight.grad]
            entries = torch.cat(
                [g.abs().flatten() for g in gradients if isinstance(g, torch.Tensor)]
            )
            totals[layer] += float(entries.mean()) / len(examples)
    lm.network.zero_grad(set_to_none=True)
    return totals


def test_the_most_salient_blocks_are_edited_and_the_profile_is_kept(
    lm: LanguageModel, tmp_path: Path
) -> None:
    profile = plain_profile(lm)
    order = sorted(range(lm.layers), key=lambda layer: -profile[layer])
    for count in (1, 2):
        editor = salem(count=count).fit(lm, divided())
        assert editor.config.layers == tuple(sorted(order[:count]))
        editor.save(tmp_path / "salem.safetensors")
        edit = load_editor(tmp_path / "salem.safetensors", lm).edit(lm, [REQUEST])
        paths = {p(i) for i in order[:count] for p in (lm.mlp_in_path, lm.mlp_out_path)}
        assert set(edit.paths) == paths
        assert edit.record.method == "salem"
        kept = Saliency.from_dict(edit.record.notes["fit"]["saliency"])
        assert kept.layers == pytest.approx(profile, rel=1e-4)
        assert kept.examples == 3 * len(divided().train)


def test_standardised_saliency_compares_with_what_must_stay(lm: LanguageModel) -> None:
    cases = divided()
    editor = salem(standardised=True).fit(lm, cases)
    kept = Saliency.from_dict(editor.fit.notes["saliency"])
    neutral = [
        Example(probe.prompt, probe.answer)
        for case in cases.train
        for probe in case.neighbours[: 1 + len(case.paraphrases)]
    ]
    examples = [
        Example(prompt, case.request.target)
        for case in cases.train
        for prompt in (case.request.text, *case.paraphrases)
    ]
    own = saliency(lm, examples, neutral=neutral, modules="mlp")
    assert kept.standardised == own.standardised and kept.layers == own.layers
    assert editor.config.layers == own.best(standardised=True)
    naive = salem().fit(lm, cases)
    assert naive.config.layers == own.best()
    assert naive.fit.notes["saliency"]["standardised"] is None


def test_standardised_saliency_needs_something_that_must_stay(lm: LanguageModel) -> None:
    cases = [replace(case, neighbours=()) for case in capital_cases()[:4]]
    with pytest.raises(ConfigError, match="no standard deviation"):
        editing_set_saliency(lm, cases, standardised=True)


def test_named_layers_are_edited_as_they_are(lm: LanguageModel) -> None:
    editor = salem(layers=[0, 3]).fit(lm, divided())
    assert editor.config.layers == (0, 3)
    assert editor.fit.notes["saliency"]["layers"]


def test_it_edits_like_mend_with_the_salient_block_named(lm: LanguageModel) -> None:
    """The network is the same; only who names the block differs."""
    from errata.editors.hypernet.mend import Mend, MendConfig

    ours = salem().fit(lm, divided())
    settings = SHORT | {"layers": list(ours.config.layers)}
    theirs = Mend(MendConfig.from_dict(settings), Background()).fit(lm, divided())
    for path, change in ours.edit(lm, [REQUEST]).changes.items():
        assert torch.equal(change.dense(), theirs.edit(lm, [REQUEST]).changes[path].dense())


def test_a_fit_goes_on_with_the_same_block(lm: LanguageModel, tmp_path: Path) -> None:
    whole = salem().fit(lm, divided(), folder=tmp_path)
    again = salem().fit(lm, divided(), folder=tmp_path)
    assert again.config == whole.config
    assert all(torch.equal(a, again.tensors()[n]) for n, a in whole.tensors().items())


def test_it_says_what_is_wrong(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match="errata fit salem"):
        salem().edit(lm, [REQUEST])
    with pytest.raises(ConfigError, match="finds its blocks when it is fitted"):
        salem().layers(lm)
    with pytest.raises(ConfigError, match="count must be positive"):
        salem(count=0)
    with pytest.raises(ConfigError, match="cannot choose 9 layers"):
        salem(count=9).fit(lm, divided())
    with pytest.raises(ConfigError, match="blocks 0 to 3, not 7"):
        salem(layers=[7]).fit(lm, divided())
