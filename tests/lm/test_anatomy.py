from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BloomConfig

from errata.errors import ConfigError, TokenizationError, UnknownFamilyError
from errata.lm.anatomy import FAMILIES, anatomy_of
from errata.lm.forward import Paused, frozen, logits_at, pause, run_until
from errata.lm.hooks import captured, rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.tokens import pad
from errata.lm.weights import weight_out_in
from tests.lm.families import OTHERS, VARIANTS, VOCABULARY, tiny_lm

EAGER_ONLY = ("gpt_neo", "gptj", "gemma2")
"""Families for which transformers has no fused attention, or only when asked for."""
WAYS = [
    (variant, attention)
    for variant, (family, _) in VARIANTS.items()
    for attention in ("eager", "sdpa")
    if attention == "eager" or family not in EAGER_ONLY
]
LENGTHS, STARTS = (5, 12, 20, 1, 9), (0, 7, 3, 0, 8)


@cache
def model(variant: str, attention: str = "eager") -> LanguageModel:
    """Shared, since these tests change no weight."""
    return tiny_lm(variant, attention=attention)


def random_rows(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def remaining(
    rows: list[list[int]], starts: tuple[int, ...] = STARTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, remaining column and column of every token from the starts on."""
    places = [
        (row, column, column + start)
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True))
        for column in range(len(ids) - start)
    ]
    row, column, true_column = torch.tensor(places).T
    return row, column, true_column


def leaf_states(paused: Paused) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(paused.states.shape, generator=generator).to(paused.states)
    return (paused.states + 0.3 * noise).requires_grad_()


def test_every_family_has_a_variant() -> None:
    decoders = {family for family, _ in VARIANTS.values()}
    others = {family for family, *_ in OTHERS.values()}
    assert decoders | others == set(FAMILIES)
    assert {name for name in FAMILIES if FAMILIES[name].kind == "decoder"} == decoders


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_path_resolves(variant: str) -> None:
    lm = model(variant)
    wide, narrow = 24, weight_out_in(lm.mlp_out(0)).numel() // 24
    for layer in range(lm.layers):
        for part in (lm.block, lm.mlp, lm.mlp_in, lm.mlp_out, lm.attention):
            assert isinstance(part(layer), nn.Module)
        assert isinstance(lm.module(lm.anatomy.attention_out.format(layer)), nn.Module)
        assert weight_out_in(lm.mlp_out(layer)).shape == (wide, narrow)
        assert weight_out_in(lm.mlp_in(layer)).shape[1] == wide
    assert weight_out_in(lm.embedding).shape[0] == VOCABULARY == lm.vocabulary
    assert lm.head is lm.network.get_output_embeddings()
    assert (lm.layers, lm.d_model, lm.max_length) == (4, wide, 64)
    assert lm.block(-1) is lm.block(3)
    with pytest.raises(IndexError, match="blocks 0 to 3"):
        lm.block(4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_final_norm_feeds_the_head(variant: str) -> None:
    lm = model(variant)
    ids = pad(lm, random_rows((6,))).ids
    with captured({"last": lm.block(-1), "head": lm.head}, "both") as seen, torch.no_grad():
        lm.network(input_ids=ids)
    states = lm.final_norm(seen.outputs["last"])
    if variant == "opt-350m":  # has no final norm, but projects down to the embedding's width
        assert isinstance(lm.final_norm, nn.Identity)
        states = lm.module("model.decoder.project_out")(states)
    assert_close(states, seen.inputs["head"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_additive_says_whether_an_added_vector_arrives_as_it_is(variant: str) -> None:
    lm = model(variant)
    ids = pad(lm, random_rows((6, 6))).ids
    vector = torch.randn(lm.d_model)

    def add(output: Tensor) -> Tensor:
        assert output.shape == (2, 6, lm.d_model)
        output = output.clone()
        output[1, 3] += vector
        return output

    for layer in range(lm.layers):
        block = {"block": lm.block(layer)}
        with torch.no_grad():
            with captured(block, "output") as before:
                lm.network(input_ids=ids)
            with captured(block, "output") as after, rewritten_output(lm.mlp(layer), add):
                lm.network(input_ids=ids)
        shift = after.outputs["block"] - before.outputs["block"]
        arrives = torch.allclose(shift[1, 3], vector, atol=1e-5)
        assert arrives == lm.anatomy.additive
        shift[1, 3] = 0
        assert not shift.any()  # and at that position alone


@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_states_are_batch_by_tokens_by_width(variant: str) -> None:
    lm = model(variant)
    ids = pad(lm, random_rows((6, 6, 6))).ids
    parts = {
        "mlp_out": lm.mlp_out(1),
        "mlp": lm.mlp(1),
        "mlp_in": lm.mlp_in(1),
        "attention": lm.attention(1),
        "block": lm.block(1),
    }
    with captured(parts, "both") as seen, torch.no_grad():
        lm.network(input_ids=ids)
    assert set(seen.inputs) == set(seen.outputs) == set(parts)
    for states in (*seen.inputs.values(), *seen.outputs.values()):
        assert states.shape[:2] == (3, 6) and states.dim() == 3
    assert seen.inputs["attention"].shape[2] == lm.d_model
    keys = seen.inputs["mlp_out"]
    values = keys @ weight_out_in(lm.mlp_out(1)).T
    bias = getattr(lm.mlp_out(1), "bias", None)
    assert_close(values if bias is None else values + bias, seen.outputs["mlp_out"])


@pytest.mark.parametrize("layer", [-1, 0, 1, 3])
@pytest.mark.parametrize(("variant", "attention"), WAYS)
def test_resume_equals_the_full_pass(variant: str, attention: str, layer: int) -> None:
    lm = model(variant, attention)
    rows = random_rows()
    row, column, true_column = remaining(rows)
    paused = pause(lm, rows, STARTS, layer)
    states = leaf_states(paused)

    def rewrite(output: Tensor) -> Tensor:
        output = output.clone()
        output[row, true_column] = states[row, column]
        return output

    with frozen(lm):
        resumed = paused.resume(states, row, column)
        with rewritten_output(lm.embedding if layer < 0 else lm.block(layer), rewrite):
            full = logits_at(lm, pad(lm, rows), row, true_column)
        assert_close(resumed, full, atol=1e-5, rtol=0)
        weights = torch.randn(full.shape)
        (found,) = torch.autograd.grad((resumed * weights).sum(), states)
        (wanted,) = torch.autograd.grad((full * weights).sum(), states)
    assert wanted.any()
    assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_from_below_a_rewritten_mlp(variant: str) -> None:
    lm = model(variant)
    rows = random_rows()
    row, column, true_column = remaining(rows)
    vector = torch.randn(lm.d_model, requires_grad=True)

    def at(columns: Tensor) -> Tensor:
        place = torch.zeros(len(rows), int(columns.max()) + 1)
        place[torch.arange(len(rows)), columns] = 1
        return place

    def added(output: Tensor, columns: Tensor) -> Tensor:
        place = nn.functional.pad(at(columns), (0, output.shape[1] - at(columns).shape[1]))
        return output + place[..., None] * vector

    for layer in (0, 2):
        paused = pause(lm, rows, STARTS, layer - 1)
        with frozen(lm):
            with rewritten_output(lm.mlp(layer), lambda o: added(o, torch.zeros(5).long())):
                resumed = paused.resume(paused.states, row, column)
            with rewritten_output(lm.mlp(layer), lambda o: added(o, torch.tensor(STARTS))):
                full = logits_at(lm, pad(lm, rows), row, true_column)
            (found,) = torch.autograd.grad(resumed.square().sum(), vector)
            (wanted,) = torch.autograd.grad(full.square().sum(), vector)
        assert_close(resumed, full, atol=1e-5, rtol=0)
        assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("variant", ["gpt2", "opt", "gemma2-sliding", "gemma3_text-sliding"])
def test_select_runs_some_rows_alone(variant: str) -> None:
    lm = model(variant)
    rows = random_rows()
    paused = pause(lm, rows, STARTS, 1)
    select = torch.tensor([4, 1])
    row, column = torch.tensor([0, 1, 1]), torch.tensor([0, 4, 0])
    with torch.no_grad():
        some = paused.resume(paused.states[select], row, column, select)
        assert_close(some, paused.resume(paused.states, select[row], column), atol=1e-5, rtol=0)


def test_resume_can_be_repeated_and_leaves_nothing() -> None:
    lm = model("llama")
    rows = random_rows()
    paused = pause(lm, rows, STARTS, 1)
    index = torch.arange(5), torch.zeros(5).long()
    with torch.no_grad():
        once = paused.resume(paused.states, *index)
        assert torch.equal(once, paused.resume(paused.states, *index))
    for module in lm.network.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_fill_the_length(variant: str) -> None:
    """Past and remainder of different rows together exceed the longest text."""
    lm = model(variant)
    rows, starts = random_rows((64, 64, 30)), (0, 60, 10)
    if lm.anatomy.fixed_mask:
        with pytest.raises(TokenizationError, match="side by side"):
            pause(lm, rows, starts, 1)
        return
    row, column, true_column = remaining(rows, starts)
    paused = pause(lm, rows, starts, 1)
    with torch.no_grad():
        resumed = paused.resume(paused.states, row, column)
        assert_close(resumed, logits_at(lm, pad(lm, rows), row, true_column), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "llama", "gemma2-sliding", "opt-350m"])
def test_half_precision_stays_close(variant: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(variant, dtype=dtype)
    rows = random_rows()
    row, column, true_column = remaining(rows)
    paused = pause(lm, rows, STARTS, 1)
    assert paused.states.dtype == dtype
    with torch.no_grad():
        full = logits_at(lm, pad(lm, rows), row, true_column).float()
        resumed = paused.resume(paused.states, row, column).float()
    assert resumed.isfinite().all()
    assert (resumed - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_at_are_the_full_logits(variant: str) -> None:
    lm = model(variant)
    batch = pad(lm, random_rows())
    row, column = torch.tensor([2, 0, 2]), torch.tensor([19, 4, 0])
    with torch.no_grad():
        full = lm.network(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert_close(logits_at(lm, batch, row, column), full[row, column], atol=1e-5, rtol=0)


def test_frozen_thaws_again() -> None:
    lm = tiny_lm("gpt2")
    lm.mlp_out(0).requires_grad_(False)
    before = [parameter.requires_grad for parameter in lm.network.parameters()]
    with pytest.raises(KeyboardInterrupt), frozen(lm):
        assert not any(parameter.requires_grad for parameter in lm.network.parameters())
        raise KeyboardInterrupt
    assert before == [parameter.requires_grad for parameter in lm.network.parameters()]
    assert True in before and False in before


def run(lm: LanguageModel, ids: Tensor) -> None:
    """A pass through all blocks, also of an encoder-decoder."""
    answer = {"decoder_input_ids": ids} if lm.kind == "encoder-decoder" else {}
    with torch.no_grad():
        lm.network(input_ids=ids, **answer)


@pytest.mark.parametrize("variant", OTHERS)
def test_paths_of_encoders_and_encoder_decoders(variant: str) -> None:
    lm = model(variant)
    stacks = [lm.anatomy.encoder, lm.anatomy] if lm.anatomy.encoder else [lm.anatomy]
    depths = [3, 2] if lm.anatomy.encoder else [4]
    assert lm.kind == ("encoder-decoder" if lm.anatomy.encoder else "encoder")
    assert (lm.layers, lm.d_model) == (sum(depths), 24)
    places = [(stack, i) for stack, depth in zip(stacks, depths, strict=True) for i in range(depth)]
    for layer, (stack, index) in enumerate(places):
        assert lm.mlp_out_path(layer) == stack.mlp_out.format(index)
        assert lm.mlp_out(layer) is lm.module(stack.mlp_out.format(index))
        assert lm.mlp_in(layer) is lm.module(stack.mlp_in.format(index))
        assert lm.mlp(layer) is lm.module(stack.mlp.format(index))
        assert lm.attention(layer) is lm.module(stack.attention.format(index))
        assert lm.block(layer) is lm.module(stack.block.format(index))
        assert weight_out_in(lm.mlp_out(layer)).shape == (24, 40)
        assert weight_out_in(lm.mlp_in(layer)).shape == (40, 24)
        assert weight_out_in(lm.module(stack.attention_out.format(index))).shape == (24, 24)
        parts = set(lm.block(layer).modules())
        assert parts > {lm.mlp(layer), lm.mlp_in(layer), lm.mlp_out(layer), lm.attention(layer)}
    assert len({lm.block(layer) for layer in range(lm.layers)}) == lm.layers
    assert lm.block(-1) is lm.block(lm.layers - 1)
    assert weight_out_in(lm.embedding).shape[0] == VOCABULARY == lm.vocabulary
    with pytest.raises(IndexError, match=f"blocks 0 to {lm.layers - 1}"):
        lm.mlp_out_path(lm.layers)


@pytest.mark.parametrize("variant", OTHERS)
def test_states_of_encoders_and_encoder_decoders(variant: str) -> None:
    lm = model(variant)
    ids = torch.randint(5, VOCABULARY, (3, 6))
    for layer in range(lm.layers):
        parts = {
            "mlp_out": lm.mlp_out(layer),
            "mlp": lm.mlp(layer),
            "mlp_in": lm.mlp_in(layer),
            "attention": lm.attention(layer),
            "block": lm.block(layer),
        }
        with captured(parts, "both") as seen:
            run(lm, ids)
        for name in ("mlp_out", "mlp", "attention", "block"):
            assert seen.outputs[name].shape == (3, 6, 24)
        assert seen.inputs["attention"].shape == (3, 6, 24)
        keys, out = seen.inputs["mlp_out"], lm.mlp_out(layer)
        assert keys.shape == (3, 6, 40)
        assert_close(out(keys), seen.outputs["mlp_out"])
        assert_close(out(keys), seen.outputs["mlp"])


@pytest.mark.parametrize("variant", OTHERS)
def test_additive_in_encoders_and_encoder_decoders(variant: str) -> None:
    lm = model(variant)
    ids = torch.randint(5, VOCABULARY, (1, 6))
    vector = torch.randn(lm.d_model)
    for layer in range(lm.layers):
        block = {"block": lm.block(layer)}
        with captured(block, "output") as before:
            run(lm, ids)
        with (
            captured(block, "output") as after,
            rewritten_output(lm.mlp(layer), lambda output: output + vector),
        ):
            run(lm, ids)
        shift = after.outputs["block"] - before.outputs["block"]
        assert shift.abs().min() > 0
        arrives = torch.allclose(shift, vector.expand_as(shift), atol=1e-5)
        assert arrives == lm.anatomy.additive == (variant in ("t5", "t5-gated"))


@pytest.mark.parametrize("variant", ["t5", "t5-gated", "bart"])
def test_final_norm_feeds_the_head_of_an_encoder_decoder(variant: str) -> None:
    lm = model(variant)
    with captured({"last": lm.block(-1), "head": lm.head}, "both") as seen:
        run(lm, torch.randint(5, VOCABULARY, (1, 6)))
    states = lm.final_norm(seen.outputs["last"])
    scale = 24**-0.5 if variant == "t5" else 1.0  # as T5's first version shrinks them
    assert_close(states * scale, seen.inputs["head"])


@pytest.mark.parametrize(
    ("variant", "length"),
    [("bert", 64), ("roberta", 64), ("distilbert", 64), ("bart", 64), ("t5", 512)],
)
def test_max_length_is_what_the_model_can_read(variant: str, length: int) -> None:
    lm = model(variant)
    assert lm.max_length == length
    run(lm, torch.randint(5, VOCABULARY, (1, length)))
    if variant != "t5":  # whose positions have no end
        with pytest.raises((IndexError, RuntimeError)):
            run(lm, torch.randint(5, VOCABULARY, (1, length + 1)))


def test_max_length_of_relative_positions_is_the_tokenizers() -> None:
    assert tiny_lm("t5", model_max_length=100).max_length == 100


def test_roberta_pads_with_the_token_that_it_does_not_count() -> None:
    lm = tiny_lm("roberta", pad_token=None)
    assert lm.pad_id == 1


@pytest.mark.parametrize("variant", ["bert", "t5"])
def test_a_decoder_can_be_required(variant: str) -> None:
    lm = model(variant)
    with pytest.raises(ConfigError, match=f"^ROME needs a decoder; tiny-{variant} is an encoder"):
        lm.require_decoder("ROME")
    with pytest.raises(ConfigError, match="needs a decoder"):
        pause(lm, [[5, 6, 7]], [1], 0)
    with pytest.raises(ConfigError, match="needs a decoder"):
        run_until(lm, [[5, 6, 7]], lm.mlp_out(0))
    model("gpt2").require_decoder("ROME")


def test_a_classifier_has_no_head_over_tokens() -> None:
    with pytest.raises(ConfigError, match="tiny-bert-labels chooses one of 3 labels"):
        _ = model("bert-labels").head


def test_unknown_family_says_how_to_add_one() -> None:
    with pytest.raises(UnknownFamilyError, match="(?s)'bloom'.*gpt2.*one entry in FAMILIES"):
        anatomy_of(BloomConfig())
