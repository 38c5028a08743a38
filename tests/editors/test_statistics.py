"""Second moments: one pass for all layers, real tokens only, resumable, cached by content."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from errata.editors.closed_form import corpus, moment_cache, statistics
from errata.editors.closed_form.corpus import own_text, read_corpus
from errata.editors.closed_form.moment_cache import cache_folder
from errata.editors.closed_form.moments import Moments
from errata.editors.closed_form.statistics import collect, estimate
from errata.errors import (
    ConfigError,
    DatasetError,
    MomentError,
    NotFiniteError,
    SolveError,
    StorageError,
)
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in

SENTENCE = "the nile flows to Paris and Rome where nine poems of Curie were read in a morning"
WORDS = SENTENCE.split()
DOCUMENTS = [
    " ".join(WORDS[(7 * i + j * (i % 3 + 1)) % len(WORDS)] for j in range(3 + i % 11))
    for i in range(60)
]
TOKENS = 700


def slowly(lm: LanguageModel, layer: int, tokens: int) -> Tensor:
    """The definition: one document at a time, no padding, the whole model, float64."""
    total, left = torch.zeros(0), tokens
    kept: list[Tensor] = []
    handle = lm.mlp_out(layer).register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    for document in DOCUMENTS:
        ids = lm.tokenizer(document)["input_ids"][: min(left, lm.max_length)]
        if ids:
            with torch.no_grad():
                lm.network(input_ids=torch.tensor([ids]))
            left -= len(ids)
    handle.remove()
    keys = torch.cat([keys.reshape(-1, keys.shape[-1]) for keys in kept]).double()
    total = keys.mT @ keys / len(keys)
    return total.float()


def files(folder: Path) -> list[Path]:
    return sorted((folder / "moments").glob("*"))


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows, partial sums that are saved often, and short sampled texts."""
    monkeypatch.setattr(statistics, "WINDOW", 8)
    monkeypatch.setattr(statistics, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(corpus, "_DOCUMENT_TOKENS", 16)


def test_equals_the_definition_and_padding_is_never_counted(tiny_lm: LanguageModel) -> None:
    moments = collect(tiny_lm, [1], DOCUMENTS, tokens=TOKENS, batch_tokens=64)
    assert moments.tokens == TOKENS
    assert_close(moments.mean(1), slowly(tiny_lm, 1, TOKENS), rtol=1e-5, atol=1e-6)
    assert_close(moments.mean(1), moments.mean(1).mT, rtol=0, atol=0)


def test_one_pass_equals_separate_passes_and_stops_at_the_last_layer(
    tiny_lm: LanguageModel,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a block above the last layer ran")

    handle = tiny_lm.block(3).register_forward_pre_hook(refuse)
    together = collect(tiny_lm, [2, 0], DOCUMENTS, tokens=TOKENS)
    handle.remove()
    assert together.layers == (0, 2)
    for layer in (0, 2):
        alone = collect(tiny_lm, [layer], DOCUMENTS, tokens=TOKENS)
        assert_close(together.mean(layer), alone.mean(layer))


def test_batch_size_changes_nothing_but_rounding(tiny_gpt2: LanguageModel) -> None:
    small = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, batch_tokens=1)
    large = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, batch_tokens=10_000)
    assert_close(small.mean(1), large.mean(1))


def test_long_documents_are_cut(tiny_gpt2: LanguageModel) -> None:
    book = [" ".join(DOCUMENTS)] * 10
    assert collect(tiny_gpt2, [1], book, tokens=10_000).tokens == 10 * tiny_gpt2.max_length
    assert collect(tiny_gpt2, [1], book, tokens=10_000, longest=50).tokens == 500


def test_the_model_is_left_as_it_was(tiny_gpt2: LanguageModel) -> None:
    before = {name: p.clone() for name, p in tiny_gpt2.network.named_parameters()}
    collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS)
    for name, parameter in tiny_gpt2.network.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks for m in tiny_gpt2.network.modules())


class Killed(BaseException):
    pass


def dying(documents: list[str], after: int) -> Callable[[], Iterator[str]]:
    def stream() -> Iterator[str]:
        for number, document in enumerate(documents):
            if number == after:
                raise Killed
            yield document

    return stream


def test_a_killed_pass_goes_on_where_it_was(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    whole = read_corpus(DOCUMENTS)
    broken = corpus.Corpus(whole.name, dying(DOCUMENTS, 30), whole.fingerprint)
    with pytest.raises(Killed):
        collect(tiny_gpt2, [0, 1], broken, tokens=TOKENS, cache=tmp_path)
    (partial,) = files(tmp_path)
    assert partial.name.endswith(".partial.safetensors")

    reported: list[int] = []
    resumed = collect(
        tiny_gpt2,
        [0, 1],
        whole,
        tokens=TOKENS,
        cache=tmp_path,
        progress=lambda _stage, done, _total: reported.append(done),
    )
    assert reported[0] > 0 and reported[-1] == TOKENS
    uninterrupted = collect(tiny_gpt2, [0, 1], DOCUMENTS, tokens=TOKENS)
    assert resumed.key == uninterrupted.key and resumed.tokens == TOKENS
    for layer in (0, 1):
        assert torch.equal(resumed.mean(layer), uninterrupted.mean(layer))
    assert not partial.exists() and len(files(tmp_path)) == 2


def test_a_damaged_partial_sum_is_not_used(
    tiny_gpt2: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read_corpus(DOCUMENTS)
    broken = corpus.Corpus(whole.name, dying(DOCUMENTS, 30), whole.fingerprint)
    with pytest.raises(Killed):
        collect(tiny_gpt2, [1], broken, tokens=TOKENS, cache=tmp_path)
    (partial,) = files(tmp_path)
    partial.write_bytes(partial.read_bytes()[:-100])
    again = collect(tiny_gpt2, [1], whole, tokens=TOKENS, cache=tmp_path)
    assert "begins anew" in caplog.text
    assert_close(again.mean(1), collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS).mean(1))


def test_cached_equals_computed_and_reads_no_text(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    first = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    whole = read_corpus(DOCUMENTS)
    unread = corpus.Corpus(whole.name, dying(DOCUMENTS, 0), whole.fingerprint)
    second = collect(tiny_gpt2, [1], unread, tokens=TOKENS, cache=tmp_path)
    assert second.key == first.key and second.tokens == first.tokens
    assert torch.equal(second.mean(1), first.mean(1))


def test_layers_are_cached_one_by_one(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    wanted = []
    run = statistics._Pass.run

    def watched(self: Any, layers: Any, *rest: Any) -> Any:
        wanted.append(list(layers))
        return run(self, layers, *rest)

    monkeypatch.setattr(statistics._Pass, "run", watched)
    collect(tiny_gpt2, [0, 1, 2], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    assert wanted == [[0, 2]]


@pytest.mark.parametrize("damage", ["cut", "altered", "foreign"])
def test_a_damaged_cache_is_told_and_computed_again(
    tiny_gpt2: LanguageModel, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-1000:]
    elif damage == "altered":
        data[-5] ^= 1
    else:
        data[:] = b"this is no safetensors file"
    path.write_bytes(data)
    again = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    assert "computed again" in caplog.text
    assert torch.equal(again.mean(1), first.mean(1))
    assert torch.equal(Moments.load(path).mean(1), first.mean(1))


def test_the_key_follows_everything_the_keys_are_made_with(tiny_gpt2: LanguageModel) -> None:
    def key(layers: tuple[int, ...] = (2,), tokens: int = TOKENS, **options: Any) -> str:
        return collect(
            tiny_gpt2, layers, options.pop("text", DOCUMENTS), tokens=tokens, **options
        ).key

    base = key()
    assert key() == base
    assert key(layers=(1,)) != base
    assert key(tokens=TOKENS + 1) != base
    assert key(longest=5) != base
    assert key(text=[*DOCUMENTS, "more"]) != base
    changed = [
        weight_out_in(tiny_gpt2.mlp_out(1)),
        weight_out_in(tiny_gpt2.mlp_in(2)),
        tiny_gpt2.embedding.weight,
    ]
    for weight in changed:
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            old = float(weight[3, 5])
            weight[3, 5] += 1
            assert key() != base
            weight[3, 5] = old
            assert key() == base


def test_weights_that_come_after_the_keys_do_not_matter(tiny_gpt2: LanguageModel) -> None:
    """A ROME edit of a layer leaves that layer's moment as it was: no need to take it again."""
    before = collect(tiny_gpt2, [2], DOCUMENTS, tokens=TOKENS)
    with torch.no_grad():
        weight_out_in(tiny_gpt2.mlp_out(2)).add_(1)
        weight_out_in(tiny_gpt2.mlp_in(3)).add_(1)
        after = collect(tiny_gpt2, [2], DOCUMENTS, tokens=TOKENS)
    assert after.key == before.key
    assert torch.equal(after.mean(2), before.mean(2))


def test_an_iterator_is_read_once_and_not_cached(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    listed = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS)
    once = collect(tiny_gpt2, [1], iter(DOCUMENTS), tokens=TOKENS, cache=tmp_path)
    assert torch.equal(once.mean(1), listed.mean(1))
    assert not (tmp_path / "moments").exists()
    assert once.key == collect(tiny_gpt2, [1], iter(DOCUMENTS), tokens=TOKENS).key
    assert once.key != collect(tiny_gpt2, [1], iter(DOCUMENTS[1:]), tokens=TOKENS).key


def test_an_unwritable_cache_is_told_and_done_without(
    tiny_gpt2: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    moments = collect(tiny_gpt2, [0, 1], DOCUMENTS, tokens=TOKENS, cache=blocked)
    assert moments.layers == (0, 1)
    assert caplog.text.count("cannot be kept") == 1


def test_leftovers_of_killed_processes_are_cleared(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment_cache, "_STALE_SECONDS", -1.0)
    (tmp_path / "moments").mkdir()
    (tmp_path / "moments" / "x.safetensors.1234.tmp").write_text("half")
    collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"]


def test_too_few_tokens(tiny_gpt2: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MomentError, match="singular"):
        collect(tiny_gpt2, [1], DOCUMENTS, tokens=127)
    with pytest.raises(MomentError, match=r"has only \d+ tokens"):
        collect(tiny_gpt2, [1], DOCUMENTS[:3], tokens=TOKENS)
    with pytest.raises(MomentError, match="only 0 tokens"):
        collect(tiny_gpt2, [1], ["", " \n"], tokens=TOKENS)
    caplog.clear()
    collect(tiny_gpt2, [1], DOCUMENTS, tokens=200)
    assert "rough" in caplog.text


def test_nan_names_the_layer(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    with torch.no_grad():
        weight_out_in(tiny_gpt2.mlp_in(1))[3, 3] = float("nan")
    collect(tiny_gpt2, [0], DOCUMENTS, tokens=TOKENS)
    with pytest.raises(NotFiniteError, match="block 1"):
        collect(tiny_gpt2, [0, 1, 2], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    assert not files(tmp_path)


def test_no_such_layer(tiny_gpt2: LanguageModel) -> None:
    for layers in ([4], [-1], []):
        with pytest.raises(ConfigError, match="blocks 0 to 3"):
            collect(tiny_gpt2, layers, DOCUMENTS, tokens=TOKENS)


def test_half_precision_models_have_float32_moments(tiny_gpt2: LanguageModel) -> None:
    tiny_gpt2.network.bfloat16()
    moments = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS)
    assert moments.mean(1).dtype == torch.float32


def test_moments_factor_once(tiny_gpt2: LanguageModel) -> None:
    moments = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS)
    keys = torch.randn(3, 128, dtype=torch.float64)
    factor = moments.factor(1)
    assert moments.factor(1) is factor
    assert_close(factor.whiten(keys) @ moments.mean(1).double(), keys)


def test_moments_given_directly(tmp_path: Path) -> None:
    mean = torch.eye(4) * 2
    moments = Moments.of({3: mean}, tokens=9)
    assert moments.layers == (3,) and moments.tokens == 9
    assert moments.key == Moments.of({3: mean.clone()}).key != Moments.of({3: mean * 2}).key
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    assert torch.equal(loaded.mean(3), mean)
    assert (loaded.key, loaded.tokens) == (moments.key, 9)
    with pytest.raises(MomentError, match="block 1"):
        moments.mean(1)
    with pytest.raises(MomentError, match="square"):
        Moments.of({0: torch.zeros(3, 4)})
    with pytest.raises(SolveError, match=r"block 0 \(7 tokens\)"):
        Moments.of({0: torch.ones(4, 4)}, tokens=7).factor(0)
    with pytest.raises(NotFiniteError, match="block 0"):
        Moments.of({0: mean * float("nan")}).factor(0)
    with pytest.raises(StorageError, match="cannot write"):
        moments.save(tmp_path / "nowhere" / "moments.safetensors")
    with pytest.raises(MomentError, match="cannot read"):
        Moments.load(tmp_path / "absent.safetensors")


def test_published_moments_can_be_used(shared: Path) -> None:
    tensors = load_file(shared / "parity" / "moments.safetensors")
    moments = Moments.of({int(layer): mean for layer, mean in tensors.items()})
    assert moments.layers == (1, 2, 3)
    assert moments.factor(2).dim == 1024


def test_estimate_is_of_the_right_size(tiny_gpt2: LanguageModel) -> None:
    seconds, size = estimate(tiny_gpt2, [0, 1], 1000)
    assert 0 < seconds < 30
    assert size > 2 * 8 * 128**2
    assert estimate(tiny_gpt2, [0, 1], 1_000_000).seconds > seconds


def test_own_text_is_seeded(tiny_gpt2: LanguageModel) -> None:
    text = own_text(tiny_gpt2, 300, seed=1)
    assert list(text) == list(own_text(tiny_gpt2, 300, seed=1))
    assert list(text) != list(own_text(tiny_gpt2, 300, seed=2))
    assert len(set(text)) == len(list(text))
    assert text.fingerprint() == own_text(tiny_gpt2, 300, seed=1).fingerprint()
    assert text.fingerprint() != own_text(tiny_gpt2, 300, seed=2).fingerprint()
    assert collect(tiny_gpt2, [0], text, tokens=300).tokens == 300


def test_own_text_is_not_sampled_again_for_cached_moments(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(tiny_gpt2, [0], own_text(tiny_gpt2, 300), tokens=300, cache=tmp_path)
    monkeypatch.setattr(corpus, "complete", None)
    again = collect(tiny_gpt2, [0], own_text(tiny_gpt2, 300), tokens=300, cache=tmp_path)
    assert torch.equal(again.mean(0), first.mean(0))


def test_a_mute_model_is_told(tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "complete", lambda _lm, starts, **_: [" "] * len(starts))
    with pytest.raises(MomentError, match="writes nothing"):
        list(own_text(tiny_gpt2, 300))


def test_reads_text_files(tmp_path: Path) -> None:
    lines, paragraphs = tmp_path / "lines.txt", tmp_path / "paragraphs.txt"
    lines.write_text("one\n" * 30 + "\ntwo ü\n", encoding="utf-8")
    paragraphs.write_text("\ufeff\none\nmore\n\n\n two\n", encoding="utf-8")
    assert list(read_corpus(lines)) == ["one"] * 30 + ["two ü"]
    assert list(read_corpus(str(paragraphs))) == ["one\nmore", "two"]
    before = read_corpus(lines).fingerprint()
    assert before == read_corpus(str(lines)).fingerprint() is not None
    lines.write_text("other")
    assert read_corpus(lines).fingerprint() != before


def test_reads_json_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": "b1"}\n\n{"text": "b2"}\n')
    (tmp_path / "deep" / "c.md").write_text("c")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert list(read_corpus(tmp_path)) == ["a", "b1", "b2", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', 'line 2: expected .* "text"'),
        ("x.txt", b"\xff\xfe\xff", "as UTF-8"),
    ],
)
def test_bad_text_names_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        list(read_corpus(tmp_path / name))


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no file or folder"):
        read_corpus(tmp_path / "absent.txt")
    with pytest.raises(DatasetError, match="holds no text"):
        read_corpus(tmp_path)
    with pytest.raises(DatasetError, match="document 1 is of type int"):
        list(read_corpus(["a", 2]))  # type: ignore[list-item]
    with pytest.raises(DatasetError, match="write hub:name"):
        read_corpus("hub:a:b:c:d:e")


def test_reads_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((name, config, options))
        return iter([{"body": "one"}, {"body": "two"}])

    def load_dataset_builder(name: str, config: str | None) -> SimpleNamespace:
        return SimpleNamespace(hash="commit", config_id=config)

    fake = SimpleNamespace(load_dataset=load_dataset, load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    wiki = read_corpus("hub:some/wiki:en::body")
    assert list(wiki) == ["one", "two"]
    assert asked == [("some/wiki", "en", {"split": "train", "streaming": True})]
    assert wiki.fingerprint() != read_corpus("hub:some/wiki:de::body").fingerprint()
    with pytest.raises(DatasetError, match=r"no text in field 'text'; it has \['body'\]"):
        list(read_corpus("hub:some/wiki:en"))


def test_a_hub_data_set_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"errata\[hub\]"):
        read_corpus("hub:some/wiki")


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ERRATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "errata"
    assert not cache_folder().exists()


def test_the_pass_is_told_as_it_goes(tiny_gpt2: LanguageModel) -> None:
    told: list[tuple[str, int, int]] = []
    collect(tiny_gpt2, [1], DOCUMENTS, tokens=10_000, progress=lambda *step: told.append(step))
    assert {stage for stage, _, _ in told} == {"moments"}
    assert told[0] == ("moments", 0, 10_000)
    assert told[-1][1] == told[-1][2] < 10_000  # the text ended before


def test_two_processes_write_the_same_file(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    """Whoever is last replaces a whole file by an equal one; a reader never sees half of it."""
    first = collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    store = moment_cache.MomentCache(tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    with path.open("rb") as reader:
        store.save(Moments({1: first.mean(1)}, first.tokens, path.stem))
        assert reader.read() == whole
    assert torch.equal(Moments.load(path).mean(1), first.mean(1))
    assert files(tmp_path) == [path]


def test_nothing_is_logged_when_all_is_well(
    tiny_gpt2: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        collect(tiny_gpt2, [1], DOCUMENTS, tokens=TOKENS, cache=tmp_path)
    assert not caplog.records
