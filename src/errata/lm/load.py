"""LanguageModel: a network, its tokenizer and its anatomy, loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from errata.errors import ErrataError, ModelLoadError, NotFiniteError, TokenizationError
from errata.lm.anatomy import Anatomy, anatomy_of
from errata.lm.hooks import mark_flat

POCKET = ("pocket", "pocket-llama")
"""The models that come with errata."""


def pocket_folder(name: str) -> Path:
    """Where an embedded model's files are."""
    return Path(str(resources.files("errata.pocket"))) / "weights" / name


@dataclass(eq=False)
class LanguageModel:
    """A causal language model that errata can look into and edit.

    Make one with `load` (a name or folder) or `of` (objects already in memory).
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    name: str
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Weights as loaded of every matrix that edits have changed, by module path."""
    applied: list[Any] = field(default_factory=list, repr=False)
    """The edits now on the weights, in order."""

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | dict[str, Any] | None = None,
    ) -> Self:
        """Load `pocket`, `pocket-llama`, a local folder or a Hub name; safetensors only.

        Args:
            name: which model.
            dtype: the weights' dtype; the files' own by default (float32 for the pocket models,
                which are small and stored in half precision).
            device: where to put the whole model; the CPU by default.
            device_map: instead of `device`, a placement as transformers understands it.

        Raises:
            ModelLoadError: there is no such model, it is incomplete, or it needs remote code.
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
            anatomy_of(config)  # an unknown family fails before gigabytes are read
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            with _no_weights_bar():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
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
                "  Give 'pocket', 'pocket-llama', a folder with config.json, tokenizer files and "
                "safetensors weights, or a Hub name (needs a network)."
            ) from error
        return cls.of(network, tokenizer, name=str(name))

    @classmethod
    def of(
        cls, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = ""
    ) -> Self:
        """Wrap a network and a fast tokenizer that are already in memory.

        Raises:
            TokenizationError: the tokenizer gives no character offsets (it is not a fast one).
            UnknownFamilyError: errata has no anatomy for the network's type.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizationError(
                "errata finds the subject through character offsets, which only a fast tokenizer "
                f"gives; {type(tokenizer).__name__} is not one. Save it with tokenizer.json and "
                "load it again."
            )
        network.eval()
        anatomy = anatomy_of(network.config)
        lm = cls(network, tokenizer, anatomy, name or str(network.config.name_or_path))
        if anatomy.flat_mlp:
            for layer in range(lm.layers):
                for module in (lm.mlp(layer), lm.mlp_in(layer), lm.mlp_out(layer)):
                    mark_flat(module, lm.block(layer))
        return lm

    @property
    def config(self) -> PretrainedConfig:
        """The network's configuration."""
        return self.network.config

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        return int(self.config.max_position_embeddings)

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
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.vocabulary:  # some pads were never embedded
                return int(token)
        return 0

    def module(self, path: str) -> nn.Module:
        """The module at a path such as `transformer.h.2.mlp`."""
        return self.network.get_submodule(path)

    def block(self, layer: int) -> nn.Module:
        """Block `layer` (0-based; negative numbers count from the end)."""
        return self.module(self.anatomy.block.format(self._index(layer)))

    def mlp(self, layer: int) -> nn.Module:
        """The module whose output is block `layer`'s MLP contribution."""
        return self.module(self.anatomy.mlp.format(self._index(layer)))

    def mlp_in(self, layer: int) -> nn.Module:
        """First matrix of block `layer`'s MLP."""
        return self.module(self.anatomy.mlp_in.format(self._index(layer)))

    def mlp_out_path(self, layer: int) -> str:
        """Path of the matrix that closed-form edits change."""
        return self.anatomy.mlp_out.format(self._index(layer))

    def mlp_out(self, layer: int) -> nn.Module:
        """Last matrix of block `layer`'s MLP: keys go in, values come out."""
        return self.module(self.mlp_out_path(layer))

    def attention(self, layer: int) -> nn.Module:
        """Block `layer`'s attention module."""
        return self.module(self.anatomy.attention.format(self._index(layer)))

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
        """The matrix that turns states into logits."""
        head = self.network.get_output_embeddings()  # asked, as its path changed between versions
        assert isinstance(head, nn.Module)
        return head

    def check_finite(self, paths: Iterable[str] = ("",)) -> None:
        """Look for NaN and infinity in the weights of some modules, by default of all.

        Raises:
            NotFiniteError: there is one; the weight is named.
        """
        for path in paths:
            for name, weight in self.module(path).named_parameters(prefix=path):
                if not weight.isfinite().all():
                    raise NotFiniteError(
                        f"the weight {name!r} of {self.name} holds NaN or infinity. Load the model "
                        "afresh; if its files are damaged, fetch them again."
                    )

    @property
    def _embedded(self) -> Tensor:
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

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


@contextmanager
def _no_weights_bar() -> Iterator[None]:
    """Keep transformers' bar "Loading weights" off the user's terminal, and nothing else."""
    # The first 5.x versions of transformers have no such hook; their bar is shown.
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == "Loading weights":
            kwargs = kwargs | {"disable": True}
        return before(factory, args, kwargs) if before else factory(*args, **kwargs)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)
