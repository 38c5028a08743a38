from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedTokenizer
from transformers.utils import logging as transformers_logging

from errata.errors import ModelLoadError, NotFiniteError, TokenizationError, UnknownFamilyError
from errata.lm import load
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from tests.lm.families import OTHERS, network, tiny_lm, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete saved model in bfloat16; the test may damage it."""
    network("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_as_it_is(folder: Path) -> None:
    lm = LanguageModel.load(folder)
    assert lm.dtype == torch.bfloat16 and lm.device == torch.device("cpu")
    assert lm.name == str(folder) and not lm.network.training
    assert not lm.applied and not lm.originals
    wanted = network("gpt2", dtype=torch.bfloat16).state_dict()
    for name, weight in lm.network.state_dict().items():
        assert torch.equal(weight, wanted[name])


@pytest.mark.parametrize("dtype", ["float16", torch.float32, "float64", "auto"])
def test_dtypes(folder: Path, dtype: str | torch.dtype) -> None:
    wanted = {"auto": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    lm = LanguageModel.load(str(folder), dtype=dtype, device="cpu")
    assert lm.dtype == (dtype if isinstance(dtype, torch.dtype) else wanted[dtype])


@pytest.mark.parametrize("dtype", ["int8", "flaot16", "nn", torch.int64])
def test_other_dtypes_are_refused(folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ModelLoadError, match="is not a dtype for weights; use float32"):
        LanguageModel.load(folder, dtype=dtype)


def test_places(folder: Path) -> None:
    assert LanguageModel.load(folder, device=torch.device("cpu")).device.type == "cpu"
    with pytest.raises(ModelLoadError, match="not both"):
        LanguageModel.load(folder, device="cpu", device_map="auto")
    with pytest.raises(ModelLoadError, match="cannot load"):
        LanguageModel.load(folder, device="nowhere")


def test_an_absent_pocket_model_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "pocket_folder", lambda name: tmp_path / name)
    with pytest.raises(ModelLoadError, match=r"'pocket-llama' is missing.*errata\.pocket\.grow"):
        LanguageModel.load("pocket-llama")


def test_pocket_models_are_widened_to_float32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "pocket_folder", lambda _: folder)
    lm = LanguageModel.load("pocket")
    assert (lm.name, lm.dtype) == ("pocket", torch.float32)
    assert LanguageModel.load("pocket", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["./absent", "/absent/x", "a/b/c", Path("absent")])
def test_an_absent_folder(name: str | Path) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        LanguageModel.load(name)


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr("errata.lm.load.AutoConfig.from_pretrained", offline)
    with pytest.raises(ModelLoadError, match=r"(?s)'nobody/nothing': We couldn't.*Give 'pocket'"):
        LanguageModel.load("nobody/nothing")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot load"):
        LanguageModel.load(tmp_path)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(network("gpt2").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        LanguageModel.load(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_files_cut_short(folder: Path, file: str, keep: float) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ModelLoadError, match="cannot load"):
        LanguageModel.load(folder)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    change_config(folder, n_layer=5)
    with pytest.raises(ModelLoadError, match=r"lack 12 of the weights.*transformer\.h\.4\."):
        LanguageModel.load(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, n_embd=28)
    with pytest.raises(ModelLoadError, match="cannot load"):
        LanguageModel.load(folder)


def test_a_mistyped_config(folder: Path) -> None:
    change_config(folder, n_embd="wide")
    with pytest.raises(ModelLoadError, match="n_embd"):
        LanguageModel.load(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_code_in_a_checkpoint_is_never_run(folder: Path, model_type: str) -> None:
    marker = folder / "ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import GPT2Config as C, GPT2LMHeadModel as M, GPT2Tokenizer as T\n"
    )
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    change_config(folder, model_type=model_type, auto_map=code)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.T", "evil.T"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type == "gpt2":  # a known type is read by transformers' own code
        LanguageModel.load(folder)
    else:
        with pytest.raises(ModelLoadError, match="custom code"):
            LanguageModel.load(folder)
    assert not marker.exists()


def test_an_unknown_family_fails_before_its_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    change_config(folder, model_type="bloom")
    with pytest.raises(UnknownFamilyError, match="bloom"):
        LanguageModel.load(folder)


def saved(variant: str, folder: Path) -> LanguageModel:
    lm = tiny_lm(variant)
    lm.network.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return lm


@pytest.mark.parametrize("variant", OTHERS)
def test_every_head_comes_back_as_it_was_saved(variant: str, tmp_path: Path) -> None:
    lm = saved(variant, tmp_path)
    loaded = LanguageModel.load(tmp_path)
    assert type(loaded.network) is type(lm.network)
    assert (loaded.kind, loaded.task, loaded.labels) == (lm.kind, lm.task, lm.labels)
    if "labels" in variant:
        assert (loaded.task, loaded.labels) == ("classify", ("refutes", "supports", "0"))
    else:
        task = "fill-mask" if loaded.kind == "encoder" else "generate"
        assert (loaded.task, loaded.labels) == (task, ())
    text = lm.tokenizer("The capital of France is Paris.", return_tensors="pt")
    ids = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    if lm.kind == "encoder-decoder":
        ids["decoder_input_ids"] = ids["input_ids"]
    with torch.no_grad():
        assert_close(loaded.network(**ids).logits, lm.network(**ids).logits)
    wanted_weights = lm.network.state_dict()
    for name, weight in loaded.network.state_dict().items():
        assert torch.equal(weight, wanted_weights[name])


def test_an_encoder_without_a_head_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for names, told in (
        (["BertModel"], "is called 'BertModel'"),
        (["BertForTokenClassification"], "is called 'BertForTokenClassification'"),
        (None, "has no 'architectures'"),
    ):
        change_config(tmp_path, architectures=names)
        with pytest.raises(ModelLoadError, match="this encoder has no head.*ForMaskedLM") as caught:
            LanguageModel.load(tmp_path)
        assert told in str(caught.value)
    bare: Any = tiny_lm("bert").network
    with pytest.raises(ModelLoadError, match="this encoder has no head"):
        LanguageModel.of(bare.bert, tokenizer("masked"))


@pytest.mark.parametrize(
    ("variant", "architecture"),
    [("gpt2", "GPT2ForSequenceClassification"), ("bart", "BartForQuestionAnswering")],
)
def test_other_heads_are_refused(variant: str, architecture: str, tmp_path: Path) -> None:
    saved(variant, tmp_path)
    change_config(tmp_path, architectures=[architecture])
    with pytest.raises(ModelLoadError, match=f"no head that errata can ask.*{architecture}"):
        LanguageModel.load(tmp_path)


@pytest.mark.parametrize(("variant", "bare"), [("gpt2", "transformer"), ("bart", "model")])
def test_a_bare_model_whose_embedding_is_its_head_loads(
    variant: str, bare: str, tmp_path: Path
) -> None:
    lm = saved(variant, tmp_path)
    getattr(lm.network, bare).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0].endswith("Model")
    assert torch.equal(weight_out_in(LanguageModel.load(tmp_path).head), weight_out_in(lm.head))


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"id2label": {"0": "score"}}]
)
def test_classifiers_must_choose_one_label(changes: dict[str, Any], tmp_path: Path) -> None:
    lm = saved("bert-labels", tmp_path)
    change_config(tmp_path, **changes)
    if "id2label" in changes:
        lm.network.classifier = torch.nn.Linear(24, 1)
        lm.network.config.id2label = {0: "score"}
        lm.network.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="classifiers that choose one of several labels"):
        LanguageModel.load(tmp_path)


def test_slow_tokenizers_are_refused() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"x": 0}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

    with pytest.raises(TokenizationError, match="only a fast tokenizer"):
        LanguageModel.of(network("gpt2"), Slow())  # type: ignore[no-untyped-call]


def test_loading_shows_no_bar_and_keeps_the_users_setting(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def own(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(kwargs)
        return factory(*args, **kwargs)

    enabled = transformers_logging.is_progress_bar_enabled()
    before = transformers_logging.set_tqdm_hook(own)
    try:
        capfd.readouterr()
        LanguageModel.load(folder)
        out, err = capfd.readouterr()
        assert (out, err) == ("", "")
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ModelLoadError):
            LanguageModel.load(folder)
    finally:
        assert transformers_logging.set_tqdm_hook(before) is own
    assert seen and seen[0]["disable"] is True
    assert transformers_logging.is_progress_bar_enabled() == enabled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_names_the_weight(value: float) -> None:
    lm = tiny_lm("llama")
    lm.check_finite()
    with torch.no_grad():
        weight_out_in(lm.mlp_out(2))[3, 1] = value
    lm.check_finite([lm.mlp_out_path(1)])
    name = r"'model\.layers\.2\.mlp\.down_proj\.weight' of tiny-llama"
    for paths in ([""], [lm.mlp_out_path(1), lm.mlp_out_path(2)]):
        with pytest.raises(NotFiniteError, match=name):
            lm.check_finite(paths)


def test_pad_id_is_a_token_that_exists() -> None:
    assert tiny_lm().pad_id == 0  # the end of text
    assert tiny_lm(pad_token="The").pad_id == tokenizer().convert_tokens_to_ids("The")
    late = tokenizer()
    late.add_special_tokens({"pad_token": "[PAD]"})
    assert late.pad_token_id == 360
    assert LanguageModel.of(network("gpt2"), late).pad_id == 0
