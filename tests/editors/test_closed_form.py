"""What ROME, MEMIT and EMMET promise beside the contracts of all editors."""

from __future__ import annotations

import pytest

from errata.editors import EDITORS
from errata.editors.closed_form.closed_form import ClosedForm
from errata.errors import ConfigError, TargetError
from errata.lm.load import LanguageModel
from errata.requests import Request
from tests.editors.test_contracts import REQUESTS, SMALL, dense, editor, probability, same, weights

methods = pytest.mark.parametrize(
    "method", [name for name in EDITORS if issubclass(EDITORS[name].editor, ClosedForm)]
)
TARGET = SMALL[ClosedForm]["target"]


@methods
def test_a_nested_table_is_as_strict_as_the_config(method: str) -> None:
    with pytest.raises(ConfigError, match="clmp"):
        EDITORS[method].config.from_dict({"target": {"clmp": 3}})


@methods
def test_several_requests_about_one_subject_share_its_key(
    method: str, tiny_gpt2: LanguageModel
) -> None:
    requests = [
        Request("{}", "Marie Curie", "discovered"),
        Request("{} was born in", "Marie Curie", "London"),
        Request("People say that {}", "Marie Curie", "likely"),
    ]
    earlier = [probability(tiny_gpt2, request) for request in requests]
    with editor(method).edit(tiny_gpt2, requests).applied(tiny_gpt2):
        later = [probability(tiny_gpt2, request) for request in requests]
    assert later[0] > earlier[0] + 0.05
    assert later[2] > earlier[2] + 0.05


@methods
def test_a_target_that_does_not_move_fails_loudly_or_is_left_out(
    method: str, tiny_gpt2: LanguageModel
) -> None:
    before = weights(tiny_gpt2)
    stuck = {"updates": 1, "learning_rate": 1e-9, "clamp": 1e-6}
    with pytest.raises(TargetError, match=r"We travel to France.*'Rome'.*did not move"):
        editor(method, target=stuck).edit(tiny_gpt2, REQUESTS)
    with pytest.raises(TargetError, match="no request could be carried out"):
        editor(method, target=stuck, keep_going=True).edit(tiny_gpt2, REQUESTS)
    assert same(before, weights(tiny_gpt2))


@methods
@pytest.mark.parametrize("spread", ["even", "root"])
@pytest.mark.parametrize("place", ["mlp", "block"])
def test_any_objective_runs_with_any_distribution_and_target(
    method: str, tiny_gpt2: LanguageModel, spread: str, place: str
) -> None:
    target = TARGET | {"place": place}
    edit = editor(method, layers=[0, 1, 2], spread=spread, target=target).edit(
        tiny_gpt2, REQUESTS[:2]
    )
    assert len(dense(edit)) == 3
    earlier = probability(tiny_gpt2, REQUESTS[0])
    with edit.applied(tiny_gpt2):
        assert probability(tiny_gpt2, REQUESTS[0]) > earlier + 1
