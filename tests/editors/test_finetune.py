"""Fine-tuning against a plain loop, in every family, and what keeps it from running away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from errata.editors import EDITORS, Background
from errata.editors.tuning import finetune, locality
from errata.editors.tuning.asked import Asked, Scored, asked_losses, last_position
from errata.editors.tuning.finetune import FineTune
from errata.editors.tuning.locality import LocalityConfig, Pool
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, NotFiniteError, TokenizationError
from errata.lm.distributions import distributions
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.lm.sentences import SentenceEncoder
from errata.lm.tokens import encode, encode_answers
from errata.lm.weights import weight_out_in
from errata.requests import Request
from tests.lm.families import SENTENCES, tiny_lm

FACT = Request("The capital of {} is", "France", "Rome")
OTHER = Request("{} lies on the", "Vienna", "Nile")
LABELLED = Request("{}", "The Nile flows to the sea.", "supports")
TEXTS = [*SENTENCES, "Rome is not in France, says France.", "You and I read what he wrote."]


def editor(method: str = "ft", **values: Any) -> FineTune:
    entry = EDITORS[method]
    small = {"layers": [1], "updates": 6, "learning_rate": 0.1, "stop_below": 0.0}
    made = entry.editor(entry.config.from_dict(small | values), Background(TEXTS))
    assert isinstance(made, FineTune)
    return made


@torch.no_grad()
def loss(lm: LanguageModel, *requests: Request) -> Tensor:
    return losses(lm, [Example(request.text, request.target) for request in requests])


def state(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.network.state_dict().items()}


def unchanged(lm: LanguageModel, before: dict[str, Tensor]) -> bool:
    after = lm.network.state_dict()
    return all(torch.equal(value, after[name]) for name, value in before.items()) and all(
        p.requires_grad and p.grad is None for p in lm.network.parameters()
    )


def root_mean_square(weight: Tensor) -> float:
    return float(weight.square().mean().sqrt())


def only(edit: WeightEdit) -> Tensor:
    (change,) = edit.changes.values()
    return change.dense()


@pytest.mark.parametrize("method", ["ft", "ft-l", "ft-kl"])
@pytest.mark.parametrize(
    "variant", ["gpt2", "opt", "llama", "bert", "bert-labels", "distilbert-labels", "t5", "bart"]
)
def test_models_of_every_kind_learn_what_they_are_told(variant: str, method: str) -> None:
    lm = tiny_lm(variant)
    request = LABELLED if lm.task == "classify" else FACT
    before, start = state(lm), loss(lm, request)
    edit = editor(method, **({"norm_limit": 0.5} if method == "ft-l" else {})).edit(lm, [request])
    assert unchanged(lm, before)
    with edit.applied(lm):
        assert loss(lm, request) < start - 0.1
        assert_close(edit.record.notes["loss after"], loss(lm, request).tolist(), rtol=1e-3, atol=0)
    assert edit.record.notes["loss before"] == pytest.approx(float(start), rel=1e-4)
    assert unchanged(lm, before)


def test_the_change_is_that_of_a_plain_loop() -> None:
    lm, plain = (tiny_lm("gpt2", dtype=torch.float64) for _ in range(2))
    made = editor(units="absolute", learning_rate=0.01, weight_decay=0.1).edit(lm, [FACT, OTHER])
    weight = plain.mlp_out(1).weight
    assert isinstance(weight, torch.nn.Parameter)
    adam = torch.optim.Adam([weight], lr=0.01, weight_decay=0.1)
    texts = encode_answers(plain, [FACT.text, OTHER.text], [FACT.target, OTHER.target])
    for _ in range(6):
        adam.zero_grad()
        each = []
        for text in texts:
            logits = plain.network(torch.tensor([text.ids])).logits[0, text.prompt_length - 1 : -1]
            each.append(cross_entropy(logits, torch.tensor(text.answer)))
        torch.autograd.backward(torch.stack(each).mean())
        adam.step()
    start = weight_out_in(lm.mlp_out(1))
    assert_close(only(made).double(), weight_out_in(plain.mlp_out(1)) - start, rtol=1e-4, atol=1e-7)
    assert made.record.notes["updates"] == 6


def test_relative_numbers_are_multiples_of_the_weights_size() -> None:
    lm = tiny_lm("gpt2")
    size = root_mean_square(weight_out_in(lm.mlp_out(1)))
    found = editor(learning_rate=0.1, updates=1).edit(lm, [FACT])
    assert float(only(found).abs().max()) == pytest.approx(0.1 * size, rel=1e-2)
    absolute = editor(learning_rate=0.1 * size, updates=1, units="absolute").edit(lm, [FACT])
    assert_close(only(absolute), only(found))


def test_no_weight_moves_further_than_the_limit() -> None:
    lm = tiny_lm("llama")
    size = root_mean_square(weight_out_in(lm.mlp_out(1)))
    free = only(editor().edit(lm, [FACT])).abs().max()
    edit = editor("ft-l", norm_limit=0.15).edit(lm, [FACT])
    assert free > 0.3 * size
    assert float(only(edit).abs().max()) == pytest.approx(0.15 * size, rel=1e-4)
    (told,) = edit.record.notes["largest change"].values()
    assert told == pytest.approx(0.15 * size, rel=1e-4)


def test_only_the_chosen_matrices_are_trained() -> None:
    lm = tiny_lm("gpt2")
    asked: list[set[str]] = []
    edit = editor(layers=[0, 2], matrices="mlp_in+mlp_out").edit(
        lm,
        [FACT],
        progress=lambda *_: asked.append(
            {name for name, p in lm.network.named_parameters() if p.requires_grad}
        ),
    )
    wanted = {path for i in (0, 2) for path in (lm.mlp_in_path(i), lm.mlp_out_path(i))}
    assert set(edit.paths) == wanted
    assert all(names == {f"{path}.weight" for path in wanted} for names in asked) and asked
    assert all(change.norm() > 0 for change in edit.changes.values())


def test_training_ends_where_the_loss_is_small_enough() -> None:
    lm = tiny_lm("gpt2")
    notes = editor(learning_rate=0.3, updates=20).edit(lm, [FACT]).record.notes
    early = editor(learning_rate=0.3, updates=20, stop_below=2.0).edit(lm, [FACT]).record.notes
    assert notes["updates"] == 20 and notes["loss after"][0] < 1.5
    assert 0 < early["updates"] < 20 and early["loss after"][0] < 2.0
    nothing = editor(stop_below=1e9).edit(lm, [FACT])
    assert nothing.record.notes["updates"] == 0 and not only(nothing).any()


def test_small_batches_give_the_same_change(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, requests = tiny_lm("gpt2", dtype=torch.float64), [FACT, OTHER]
    whole = editor("ft-kl").edit(lm, requests)
    small = editor("ft-kl")
    small.batch_tokens = 1
    monkeypatch.setattr(locality, "BATCH_TOKENS", 1)
    calls: list[int] = []

    def counted(lm: LanguageModel, asked: Sequence[Asked], loss: Scored) -> torch.Tensor:
        calls.append(len(asked))
        return asked_losses(lm, asked, loss)

    monkeypatch.setattr(finetune, "asked_losses", counted)
    assert_close(only(small.edit(lm, requests)), only(whole))
    assert set(calls) == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_trained_in_float32(dtype: torch.dtype) -> None:
    """In the weights' own dtype, updates this small would be rounded away."""
    lm = tiny_lm("gpt2", dtype=dtype)
    size = root_mean_square(weight_out_in(lm.mlp_out(1)).float())
    edit = editor(learning_rate=5e-4, updates=8).edit(lm, [FACT])
    change = only(edit)
    assert change.dtype == torch.float32
    assert float(change.abs().max()) > 5 * 5e-4 * size
    assert (change != 0).float().mean() > 0.9


def test_a_rank_keeps_the_best_of_the_change_and_says_what_is_missing() -> None:
    lm = tiny_lm("gpt2")
    full, thin = (editor(rank=rank).edit(lm, [FACT, OTHER]) for rank in (None, 2))
    (path,) = thin.paths
    assert thin.changes[path].rank == 2 and thin.nbytes < full.nbytes
    missed = float((only(full) - only(thin)).norm() / only(full).norm())
    assert 0 < thin.record.notes["error of the rank"][path] == pytest.approx(missed, rel=1e-4)
    assert full.record.notes["error of the rank"][path] == 0.0


def test_the_reference_loss_scores_all_tokens_at_the_prompts_end() -> None:
    lm = tiny_lm("gpt2")
    examples = [Example(FACT.text, "Rome and Vienna"), Example(OTHER.text, "Nile")]
    texts = encode_answers(lm, [e.prompt for e in examples], [e.answer for e in examples])
    wanted = []
    for text in texts:
        logits = lm.network(torch.tensor([text.ids[: text.prompt_length]])).logits[0, -1]
        wanted.append(-logits.log_softmax(-1)[text.answer].mean())
    assert_close(last_position(lm, examples), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    one = [Example(FACT.text, str(lm.tokenizer.decode(texts[0].answer[:1])))]
    assert len(encode_answers(lm, [FACT.text], [one[0].answer])[0].answer) == 1
    assert_close(last_position(lm, one), losses(lm, one))
    edit = editor(loss="last-position").edit(lm, [FACT])
    with edit.applied(lm), torch.no_grad():
        after = last_position(lm, [Example(FACT.text, FACT.target)])
    assert edit.record.notes["loss after"] == pytest.approx(after.tolist(), rel=1e-3)
    with pytest.raises(ConfigError, match="'last-position' needs a decoder"):
        editor(loss="last-position").edit(tiny_lm("bert"), [FACT])


# ------------------------------------------------------------------------------------------- FT+KL


@torch.no_grad()
def moved(lm: LanguageModel, edit: WeightEdit, text: str) -> float:
    """KL(before || after) on a text, the mean over its tokens."""
    rows = encode(lm, [text])
    before = distributions(lm, rows)
    with edit.applied(lm):
        after = distributions(lm, rows)
    return float((before.exp() * (before - after)).sum(dim=-1).mean())


@pytest.mark.parametrize("variant", ["gpt2", "bert-labels", "t5"])
def test_what_is_held_on_to_moves_less(variant: str) -> None:
    lm = tiny_lm(variant)
    request = LABELLED if lm.task == "classify" else FACT
    free = editor("ft-kl", kl={"weight": 0.0}).edit(lm, [request])
    held = editor("ft-kl", kl={"weight": 100.0, "neighbours": 2}).edit(lm, [request])
    texts = held.record.notes["held on to"]
    assert len(texts) == 2 and not free.record.notes["held on to"]
    for text in texts:
        assert 0 < moved(lm, held, text) < 0.5 * moved(lm, free, text)


def test_texts_that_name_a_subject_are_not_held_on_to() -> None:
    lm = tiny_lm("gpt2")
    notes = editor("ft-kl", kl={"neighbours": 50}).edit(lm, [FACT, OTHER]).record.notes
    assert notes["held on to"] == [text for text in TEXTS if "France" not in text]
    with pytest.raises(ConfigError, match="every text .* names a subject"):
        few = FineTune(editor("ft-kl").config, Background(["about france", "FRANCE!"]))
        few.edit(lm, [FACT])


def test_the_most_similar_texts_are_found_by_cosine(tmp_path: Path) -> None:
    lm, reader = tiny_lm("gpt2"), tiny_lm("bert")
    reader.network.save_pretrained(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    config = LocalityConfig(neighbours=2, encoder=str(tmp_path))
    pool = Pool.of(lm, Background(TEXTS), config)
    encoder = SentenceEncoder.load(tmp_path)
    likeness = (encoder([OTHER.text]) @ encoder(TEXTS).T)[0]
    allowed = [i for i, text in enumerate(TEXTS) if OTHER.subject not in text]
    best = sorted(allowed, key=lambda i: -float(likeness[i]))[:2]
    assert pool.nearest(lm, [OTHER]) == sorted(best)
    own = Pool.of(lm, Background(TEXTS), LocalityConfig(neighbours=1))
    (nearest,) = own.nearest(lm, [Request(SENTENCES[5] + " {}", "Yes", "Rome")])
    assert TEXTS[nearest] == SENTENCES[5]


def test_texts_are_cut_and_counted() -> None:
    lm = tiny_lm("gpt2")
    pool = Pool.of(lm, Background(["", "  ", *TEXTS]), LocalityConfig(texts=5, length=4))
    assert pool.texts == TEXTS[:3] and all(len(row) == 4 for row in pool.rows)
    with pytest.raises(ConfigError, match="no text to hold on to"):
        Pool.of(lm, Background([" "]), LocalityConfig())


def test_a_model_that_cannot_write_needs_text() -> None:
    with pytest.raises(ConfigError, match="Give ordinary text"):
        FineTune(editor("ft-kl").config, Background()).edit(tiny_lm("bert-labels"), [LABELLED])
    lm = tiny_lm("gpt2")
    config = EDITORS["ft-kl"].config.from_dict({"updates": 1, "kl": {"texts": 3, "length": 8}})
    own = EDITORS["ft-kl"].editor(config, Background()).edit(lm, [FACT])
    assert len(own.record.notes["held on to"]) == 3


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("method", ["ft", "ft-kl"])
def test_training_that_runs_away_is_stopped_and_told(method: str) -> None:
    lm = tiny_lm("gpt2")
    before = state(lm)
    with pytest.raises(NotFiniteError, match=r"after \d+ updates.*learning_rate, which is 1e\+30"):
        editor(method, learning_rate=1e30, norm_limit=None).edit(lm, [FACT])
    assert unchanged(lm, before)


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    lm = tiny_lm("gpt2")
    before = state(lm)

    def interrupt(stage: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor().edit(lm, [FACT], progress=interrupt)
    assert unchanged(lm, before)


def test_a_batch_that_fails_is_told_in_its_place() -> None:
    lm = tiny_lm("gpt2")
    long = Request("The capital of {} is", "France", "Rome " * 80)
    first, second = editor().edit_each(lm, [[long], [FACT]])
    assert isinstance(first, TokenizationError) and isinstance(second, WeightEdit)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"updates": 0}, "updates must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"norm_limit": 0.0}, "norm_limit must be positive"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"matrices": "attention"}, "matrices is one of mlp_out, mlp_in, mlp_in.mlp_out"),
        ({"loss": "first-position"}, "loss is one of answer, last-position, not 'first-position'"),
        ({"units": "meters"}, "units is one of relative, absolute, not 'meters'"),
        ({"kl": {"weight": -1.0}}, "weight must not be negative"),
        ({"kl": {"neighbours": 0}}, "neighbours must be at least 1"),
        ({"kl": {"nearest": 3}}, "has no .'nearest'."),
    ],
)
def test_numbers_without_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        editor(**values)
