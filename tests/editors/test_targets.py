"""Targets: batched equals alone, what is written is what was wanted, and failures are told."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from errata.editors.closed_form.keys import (
    at_subject,
    context_weights,
    stream_at_subject,
    subject_rows,
)
from errata.editors.closed_form.targets import TargetConfig, optimise_targets
from errata.lm.hooks import captured, rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_requests, pad
from errata.requests import Request

REQUESTS = [
    Request("We travel to {}", "France", "Rome"),
    Request("{} was born in", "Marie Curie", "London on the Danube"),
    Request("They met at {}", "the Eiffel Tower", "Vienna"),
]
CONTEXTS = ["", "Rivers flow to the sea. ", "In the morning. "]
CONFIG = TargetConfig(updates=8, clamp=3.0)


def test_a_batch_gives_what_each_request_gives_alone(tiny_lm: LanguageModel) -> None:
    groups = [[request] for request in REQUESTS]
    together = optimise_targets(tiny_lm, groups, CONTEXTS, 1, CONFIG, batch_tokens=10_000)
    alone = [
        optimise_targets(tiny_lm, [group], CONTEXTS, 1, CONFIG, batch_tokens=10_000)
        for group in groups
    ]
    in_pieces = optimise_targets(tiny_lm, groups, CONTEXTS, 1, CONFIG, batch_tokens=1)
    assert_close(together.deltas, torch.cat([one.deltas for one in alone]), rtol=1e-4, atol=1e-5)
    assert_close(together.deltas, in_pieces.deltas, rtol=1e-4, atol=1e-5)


def test_requests_stop_on_their_own(tiny_gpt2: LanguageModel) -> None:
    """A request that is done keeps its target, whoever else is still moving."""
    config = TargetConfig(updates=10, learning_rate=0.4, clamp=8.0, kl=0.0, stop_below=2.0)
    groups = [[request] for request in REQUESTS]
    together = optimise_targets(tiny_gpt2, groups, [""], 1, config, batch_tokens=10_000)
    alone = [
        optimise_targets(tiny_gpt2, [group], [""], 1, config, batch_tokens=10_000)
        for group in groups
    ]
    assert_close(together.deltas, torch.cat([one.deltas for one in alone]), rtol=1e-4, atol=1e-5)
    assert (together.loss < 2.0).any()


def test_the_loss_is_that_of_the_whole_model_with_delta_put_in(tiny_lm: LanguageModel) -> None:
    """Partial passes compute what a hook on the full model computes."""
    config = TargetConfig(place="mlp", updates=5, kl=0.0, decay=0.0)
    (request,) = REQUESTS[1:2]
    targets = optimise_targets(tiny_lm, [[request]], [""], 2, config, batch_tokens=10_000)
    (row,) = encode_requests(tiny_lm, [request])

    def put_in(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, row.subject_last] += targets.deltas[0].to(hidden)
        return hidden

    batch = pad(tiny_lm, [row.ids])
    with torch.no_grad(), rewritten_output(tiny_lm.mlp(2), put_in):
        log_p = tiny_lm.network(input_ids=batch.ids).logits[0].log_softmax(dim=1)
    answer = torch.tensor(row.answer)
    places = torch.arange(row.prompt_length - 1, len(row.ids) - 1)
    assert_close(targets.loss[0], -log_p[places, answer].mean(), rtol=1e-4, atol=1e-5)


def test_the_clamp_holds_in_both_units(tiny_gpt2: LanguageModel) -> None:
    for units, place in (("relative", "mlp"), ("absolute", "block"), ("absolute", "mlp")):
        config = TargetConfig.from_dict(
            {
                "units": units,
                "place": place,
                "clamp": 0.5,
                "learning_rate": 0.5,
                "decay": 0.0,
                "updates": 10,
            }
        )
        targets = optimise_targets(tiny_gpt2, [REQUESTS[:1]], [""], 1, config, batch_tokens=10_000)
        rows = subject_rows(tiny_gpt2, REQUESTS[:1])
        stream = stream_at_subject(tiny_gpt2, rows, 1, batch_tokens=100)[0]
        value = at_subject(tiny_gpt2, [rows], 1, batch_tokens=100).values[0, 0]
        limit = value if (units, place) == ("absolute", "mlp") else stream
        assert_close(targets.deltas[0].norm(), 0.5 * limit.norm(), rtol=1e-4, atol=0)


def test_weights_over_contexts_sum_to_one() -> None:
    assert context_weights("mean", 4).tolist() == [0.25] * 4
    assert context_weights("half-bare", 3).tolist() == [0.5, 0.25, 0.25]
    assert context_weights("bare", 3).tolist() == [1, 0, 0]
    assert context_weights("half-bare", 1).tolist() == [1]


def test_keys_are_what_goes_into_the_matrix_at_the_subject(tiny_lm: LanguageModel) -> None:
    rows = [subject_rows(tiny_lm, REQUESTS, context) for context in CONTEXTS]
    found = at_subject(tiny_lm, rows, 2, batch_tokens=20)
    for c, context in enumerate(CONTEXTS):
        for i, row in enumerate(encode_requests(tiny_lm, REQUESTS, prefix=context)):
            batch = pad(tiny_lm, [row.ids])
            with torch.no_grad(), captured({"w": tiny_lm.mlp_out(2)}, "both") as seen:
                tiny_lm.network(input_ids=batch.ids)
            assert_close(
                found.keys[i, c].float(),
                seen.inputs["w"][0, row.subject_last],
                rtol=1e-4,
                atol=1e-5,
            )
            assert_close(
                found.values[i, c].float(),
                seen.outputs["w"][0, row.subject_last],
                rtol=1e-4,
                atol=1e-5,
            )
