"""LanguageModel: a network, its tokenizer and its anatomy, loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from errata.errors import (
    ConfigError,
    EditStateError,
    ErrataError,
    ModelLoadError,
    NotFiniteError,
    TokenizationError,
)
from errata.lm.anatomy import Anatomy, Kind, anatomy_of
from errata.lm.heads import Task, head_of, labels_of
from errata.lm.hooks import mark_flat
from errata.lm.quiet import no_weights_bar
from errata.lm.weights import check_whole

_SENSIBLE = 100_000
"""Tokenizers that know no limit name one beyond all sense."""
_ACTIVATIONS = (
    "activation_function",
    "hidden_activation",
    "hidden_act",
    "activation",
    "dense_act_fn",
)
"""What configurations call the function between an MLP's matrices."""
_RELATIVE_LENGTH = 512
"""Tokens that a model with relative positions is given if its tokenizer knows no limit: T5's own
length in training."""

POCKET = ("pocket", "pocket-llama", "pocket-bert", "pocket-t5")
"""The models that come with errata."""


def pocket_folder(name: str) -> Path:
    """Where an embedded model's files are."""
    return Path(str(resources.files("errata.pocket"))) / "weights" / name


@dataclass(eq=False)
class LanguageModel:
    """A language model that errata can look into and edit.

    Make one with `load` (a name or folder) or `of` (objects already in memory). Blocks are numbered
    through: in an encoder-decoder its encoder's, then its decoder's.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    name: str
    task: Task = "generate"
    """What its head does: continue or write a text, fill in masked tokens, or choose a label."""
    labels: tuple[str, ...] = ()
    """What a classifier chooses from, in the order of its logits."""
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Weights as loaded of every matrix that edits have changed, by module path."""
    applied: list[Any] = field(default_factory=list, repr=False)
    """The edits now on the model, in order."""
    memories: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What edits beside the weights hold, merged, by kind and place (`errata.edits.memory`)."""
    prompts: Any = field(default=None, repr=False)
    """Where the prompts of the coming pass end, while that is known (`errata.lm.prompts`)."""

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | dict[str, Any] | None = None,
    ) -> Self:
        """Load an embedded model (`POCKET`), a local folder or a Hub name; safetensors only.

        Args:
            name: which model.
            dtype: the weights' dtype; the files' own by default (float32 for the pocket models,
                which are small and stored in half precision).
            device: where to put the whole model; the CPU by default.
            device_map: instead of `device`, a placement as transformers understands it.

        Raises:
            ModelLoadError: there is no such model, it is incomplete, it needs remote code, or it
                ends in no head that errata knows.
            UnknownFamilyError: errata has no anatomy for its type.
        """
        source = str(name)
        if source in POCKET:
            folder = pocket_folder(source)
            if not (folder / "model.safetensors").exists():
                raise ModelLoadError(
                    f"the embedded model {source!r} is missing from {folder}. Reinstall errata, or "
                    f"grow it again: python -m errata.pocket.grow --model {source}"
                )
            source, dtype = str(folder), dtype or torch.float32
        elif _looks_like_a_path(name) and not Path(name).is_dir():
            raise ModelLoadError(f"cannot load the model {source!r}: there is no such folder.")
        if device is not None and device_map is not None:
            raise ModelLoadError("give either device or device_map, not both.")
        dtype = "auto" if dtype is None or dtype == "auto" else _dtype(dtype)
        # A folder is complete in itself, and code that comes with a checkpoint is never run.
        where: Any = {"local_files_only": Path(source).is_dir(), "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(source, **where)
            # An unknown family or head fails before gigabytes are read.
            head = head_of(anatomy_of(config).kind, config.architectures or [])
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            with no_weights_bar():
                loaded: Any = head.auto.from_pretrained(
                    source,
                    config=config,
                    dtype=dtype,
                    device_map=device_map,
                    use_safetensors=True,
                    output_loading_info=True,
                    **where,
                )
            network, report = loaded
            if missing := sorted(report["missing_keys"]):  # transformers would fill them at random
                raise ModelLoadError(
                    f"cannot load the model {str(name)!r}: its files lack {len(missing)} of the "
                    f"weights that its config.json asks for, {missing[0]!r} first."
                )
            if device is not None:
                network.to(device)
        except ErrataError:
            raise
        # Parsers and readers below (tokenizers, safetensors, huggingface_hub) raise what they like.
        except Exception as error:
            raise ModelLoadError(
                f"cannot load the model {str(name)!r}: {error}\n"
                f"  Give {', '.join(map(repr, POCKET))}, a folder with config.json, tokenizer "
                "files and safetensors weights, or a Hub name (needs a network)."
            ) from error
        lm = cls.of(network, tokenizer, name=str(name))
        if lm._embedded.is_meta:
            raise ModelLoadError(
                f"the device map offloads the token embedding of {str(name)!r}, where tokens go "
                "in; put it on a device."
            )
        return lm

    @classmethod
    def of(
        cls, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = ""
    ) -> Self:
        """Wrap a network and a fast tokenizer that are already in memory.

        Raises:
            TokenizationError: the tokenizer gives no character offsets (it is not a fast one).
            UnknownFamilyError: errata has no anatomy for the network's type.
            ModelLoadError: it is an encoder without a head that errata knows.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizationError(
                "errata finds the subject through character offsets, which only a fast tokenizer "
                f"gives; {type(tokenizer).__name__} is not one. Save it with tokenizer.json and "
                "load it again."
            )
        network.eval()
        anatomy = anatomy_of(network.config)
        names = [one.__name__ for one in type(network).__mro__]
        task = head_of(anatomy.kind, names).task
        labels = labels_of(network.config) if task == "classify" else ()
        name = name or str(network.config.name_or_path)
        lm = cls(network, tokenizer, anatomy, name, task, labels)
        if anatomy.flat_mlp:
            for layer in range(lm.layers):
                for module in (lm.mlp(layer), lm.mlp_in(layer), lm.mlp_out(layer)):
                    mark_flat(module, lm.block(layer))
        return lm

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of.

        Raises:
            EditStateError: there are edits beside the weights, which hook into this very network.
        """
        if self.memories:
            raise EditStateError(
                f"{self.name} cannot be copied while edits beside its weights are on it: the copy "
                "would ask the original's memory. Take them back, copy it, and apply them to both."
            )
        return dict(self.__dict__)

    @property
    def config(self) -> PretrainedConfig:
        """The network's configuration."""
        return self.network.config

    @property
    def kind(self) -> Kind:
        """Whether it continues a text, reads it in both directions, or answers it with another."""
        return self.anatomy.kind

    @property
    def layers(self) -> int:
        """How many blocks there are, an encoder-decoder's encoder included."""
        return self._below + self._depth(self.anatomy)

    @property
    def reading(self) -> range:
        """The blocks that read a prompt: the encoder's, where there is one, or all."""
        return range(self._below or self.layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        length = getattr(self.config, "max_position_embeddings", None)
        if length is None:  # positions are relative: there is no end to them
            length = self.tokenizer.model_max_length
            return int(length) if length <= _SENSIBLE else _RELATIVE_LENGTH
        if self.anatomy.padded_positions:
            return int(length - self.config.pad_token_id - 1)
        return int(length)

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self._embedded.device

    @property
    def vocabulary(self) -> int:
        """How many different tokens the network can read."""
        return len(self._embedded)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' own dtype."""
        return self.network.dtype

    @property
    def pad_id(self) -> int:
        """A token for the places that a mask hides."""
        if self.anatomy.padded_positions:  # the network counts what is not this very token
            return int(self.config.pad_token_id)
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.vocabulary:  # some pads were never embedded
                return int(token)
        return 0

    def module(self, path: str) -> nn.Module:
        """The module at a path such as `transformer.h.2.mlp`."""
        return self.network.get_submodule(path)

    def block(self, layer: int) -> nn.Module:
        """Block `layer` (0-based; negative numbers count from the end)."""
        anatomy, index = self._place(layer)
        return self.module(anatomy.block.format(index))

    def mlp(self, layer: int) -> nn.Module:
        """The module whose output is block `layer`'s MLP contribution."""
        anatomy, index = self._place(layer)
        return self.module(anatomy.mlp.format(index))

    def mlp_in_path(self, layer: int) -> str:
        """Path of the first matrix of block `layer`'s MLP."""
        anatomy, index = self._place(layer)
        return anatomy.mlp_in.format(index)

    def mlp_in(self, layer: int) -> nn.Module:
        """First matrix of block `layer`'s MLP."""
        return self.module(self.mlp_in_path(layer))

    def mlp_out_path(self, layer: int) -> str:
        """Path of the matrix that closed-form edits change."""
        anatomy, index = self._place(layer)
        return anatomy.mlp_out.format(index)

    def mlp_out(self, layer: int) -> nn.Module:
        """Last matrix of block `layer`'s MLP: keys go in, values come out."""
        return self.module(self.mlp_out_path(layer))

    @property
    def activation(self) -> nn.Module:
        """The function between an MLP's matrices; of a gated MLP, that of the gate."""
        config = self.config.to_dict()
        module = ACT2FN[next(config[name] for name in _ACTIVATIONS if config.get(name))]
        assert isinstance(module, nn.Module)
        return module

    def attention(self, layer: int) -> nn.Module:
        """Block `layer`'s (self-)attention module."""
        anatomy, index = self._place(layer)
        return self.module(anatomy.attention.format(index))

    def attention_out_path(self, layer: int) -> str:
        """Path of the last matrix of block `layer`'s (self-)attention."""
        anatomy, index = self._place(layer)
        return anatomy.attention_out.format(index)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.module(self.anatomy.embedding)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head; passes states on where the family has none."""
        path = self.anatomy.final_norm
        return self.module(path) if path else nn.Identity()

    @property
    def head(self) -> nn.Module:
        """The matrix that turns states into logits over tokens.

        Raises:
            ConfigError: the model is a classifier, which has none.
        """
        head = self.network.get_output_embeddings()  # asked, as its path changed between versions
        if head is None:
            raise ConfigError(
                f"{self.name} chooses one of {len(self.labels)} labels; it has no logits over "
                "tokens."
            )
        assert isinstance(head, nn.Module)
        return head

    def require_decoder(self, what: str) -> None:
        """Refuse an encoder or encoder-decoder for `what`, which begins the message.

        Raises:
            ConfigError: the model is not a decoder.
        """
        if self.kind != "decoder":
            raise ConfigError(
                f"{what} needs a decoder; {self.name} is an {self.kind} ({self.config.model_type})."
            )

    def check_editable(self, paths: Iterable[str]) -> None:
        """Refuse to change modules whose weights are elsewhere, or here in part only.

        Raises:
            ConfigError: a weight was offloaded by a device map or cut by tensor parallelism.
        """
        for path in paths:
            for name, weight in self.module(path).named_parameters(prefix=path):
                check_whole(weight, f"{name!r} of {self.name}")

    def check_finite(self, paths: Iterable[str] = ("",)) -> None:
        """Look for NaN and infinity in the weights of some modules, by default of all.

        Raises:
            NotFiniteError: there is one; the weight is named.
        """
        for path in paths:
            for name, weight in self.module(path).named_parameters(prefix=path):
                if not (weight.is_meta or weight.isfinite().all()):
                    raise NotFiniteError(
                        f"the weight {name!r} of {self.name} holds NaN or infinity. Load the model "
                        "afresh; if its files are damaged, fetch them again."
                    )

    @property
    def _embedded(self) -> Tensor:
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _below(self) -> int:
        """How many blocks the encoder of an encoder-decoder has."""
        return self._depth(self.anatomy.encoder) if self.anatomy.encoder else 0

    def _depth(self, anatomy: Anatomy) -> int:
        blocks = self.module(anatomy.block.removesuffix(".{}"))
        assert isinstance(blocks, nn.ModuleList)
        return len(blocks)

    def _place(self, layer: int) -> tuple[Anatomy, int]:
        """The stack that block `layer` belongs to, and its number there."""
        index, below = self._index(layer), self._below
        if self.anatomy.encoder and index < below:
            return self.anatomy.encoder, index
        return self.anatomy, index - below

    def _index(self, layer: int) -> int:
        if not -self.layers <= layer < self.layers:
            raise IndexError(f"{self.name} has blocks 0 to {self.layers - 1}, not {layer}.")
        return layer % self.layers


def _looks_like_a_path(name: str | Path) -> bool:
    """Whether a name can only mean a folder, never `model` or `owner/model` on the Hub."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _dtype(name: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelLoadError(
            f"{name!r} is not a dtype for weights; use float32, bfloat16, float16, float64 or auto."
        )
    assert isinstance(dtype, torch.dtype)
    return dtype
