"""Gradient saliency: which layers answer for a set of examples, by how large their gradients are.

SaLEM (Mishra et al. 2024, section 3.2). For an example (X, Y) with loss L, and a weight W seen as
(d_out, d_in):

    parameter   s_i = |dL / dW_i|                                       (equation 2)
    column      s_p = mean of s_i over column p of W                    (equation 3)
    layer       s_l = mean of s_p over the columns p of the layer       (equation 4)
    choice      the K layers with the largest s_l                       (equation 5)

each a mean over the examples of the absolute gradient, not the absolute gradient of the mean. A
column of W is what one input of the matrix does: in an MLP's last matrix, one neuron. A layer holds
several matrices with columns of unlike length; each column counts by its length, so that s_l is the
mean over the layer's parameters.

A gradient may be large for any text. The standardised value of Levin et al. (2022) therefore
compares with neutral examples: (s - mean) / std, where mean and (unbiased) std are those of the
same quantity over the neutral examples; a std of at most 1e-14 counts as 1.

The gradient of W for one example is the sum over tokens of delta^T x, with x what goes into the
matrix and delta the gradient of what comes out. So a batch of examples costs one forward and one
backward pass, and gradients are made in the backward pass one at a time and dropped at once: no
weight ever holds one, and memory is that of a forward pass and its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from errata.edits.edit import as_json
from errata.errors import ConfigError, NotFiniteError, RequestError
from errata.lm.forward import frozen
from errata.lm.hooks import captured, rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, example_batches, losses
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent

Modules = Literal["all", "mlp"]
"""Which matrices of a block: `mlp` the MLP's first and last, `all` attention's last one too."""

SMALLEST_STD = 1e-14
"""A smaller standard deviation over the neutral examples counts as 1 (Levin et al.'s code)."""


@dataclass(frozen=True)
class ModuleSaliency:
    """One matrix' saliency: the mean over its parameters and over the examples."""

    path: str
    layer: int
    parameters: int
    naive: float
    standardised: float | None


@dataclass(frozen=True)
class Saliency:
    """How large the loss's gradients are, matrix by matrix and layer by layer."""

    model: str
    examples: int
    """How many examples the values are means over."""
    neutral: int
    """How many neutral examples they are compared with; 0 for none."""
    modules: tuple[ModuleSaliency, ...]
    layers: tuple[float, ...]
    """Each layer's naive saliency."""
    standardised: tuple[float, ...] | None
    """Each layer's standardised saliency; None without neutral examples."""

    def best(self, k: int = 1, *, standardised: bool = False) -> tuple[int, ...]:
        """The k most salient layers, the most salient first; of equals the lower first.

        Raises:
            ConfigError: there are not k layers, or no standardised values.
        """
        values = self.standardised if standardised else self.layers
        if values is None:
            raise ConfigError(
                "there are no standardised saliencies: they need neutral examples to compare with."
            )
        if not 1 <= k <= len(values):
            raise ConfigError(
                f"cannot choose {k} layers of the {len(values)} in {self.model}; choose 1 to "
                f"{len(values)}."
            )
        return tuple(sorted(range(len(values)), key=lambda layer: -values[layer])[:k])

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        record: dict[str, Any] = as_json(self)
        return record

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        standardised = values["standardised"]
        return cls(
            **{
                **values,
                "modules": tuple(ModuleSaliency(**module) for module in values["modules"]),
                "layers": tuple(values["layers"]),
                "standardised": None if standardised is None else tuple(standardised),
            }
        )


def saliency(
    lm: LanguageModel,
    examples: Sequence[Example],
    *,
    neutral: Sequence[Example] | None = None,
    modules: Modules = "all",
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> Saliency:
    """Every block's saliency for the editing set, naive and, given neutral examples, standardised.

    Args:
        lm: the model, of any kind; it is left as it is.
        examples: the editing set: prompts with the answers that are wanted.
        neutral: at least two ordinary examples to compare with.
        modules: which matrices stand for a block.
        batch_tokens: at most so many tokens, padding included, in one pass.
        progress: called with examples done.

    Raises:
        ConfigError: there is only one neutral example.
        NotFiniteError: the loss or a gradient is NaN or infinite.
        RequestError: there is no example.
    """
    if neutral is not None and len(neutral) < 2:
        raise ConfigError(
            f"{len(neutral)} neutral examples have no standard deviation; give at least two."
        )
    matrices = [(layer, path) for layer in range(lm.layers) for path in _paths(lm, layer, modules)]
    paths = [path for _, path in matrices]
    sizes = torch.tensor([weight_out_in(lm.module(path)).numel() for path in paths])
    share = torch.zeros(len(paths), lm.layers, dtype=torch.float64)
    for column, (layer, _) in enumerate(matrices):
        share[column, layer] = float(sizes[column])
    share /= share.sum(dim=0)

    def profile(some: Sequence[Example], stage: str) -> tuple[Tensor, Tensor]:
        each = _each(lm, some, paths, batch_tokens, lambda d, n: progress(stage, d, n))
        return each, each @ share

    by_module, by_layer = profile(examples, "gradients")
    compared: list[Tensor | None] = [None, None]
    if neutral is not None:
        ordinary = profile(neutral, "neutral gradients")
        compared = [
            _standardised(found, reference)
            for found, reference in zip((by_module, by_layer), ordinary, strict=True)
        ]
    per_module, per_layer = (None if c is None else tuple(c.tolist()) for c in compared)
    return Saliency(
        model=lm.name,
        examples=len(examples),
        neutral=0 if neutral is None else len(neutral),
        modules=tuple(
            ModuleSaliency(
                path,
                layer,
                parameters=int(sizes[i]),
                naive=float(by_module[:, i].mean()),
                standardised=None if per_module is None else per_module[i],
            )
            for i, (layer, path) in enumerate(matrices)
        ),
        layers=tuple(by_layer.mean(dim=0).tolist()),
        standardised=per_layer,
    )


def parameter_saliency(
    lm: LanguageModel,
    examples: Sequence[Example],
    path: str,
    *,
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> Tensor:
    """Equation 2 for one matrix: (d_out, d_in) means over the examples of |gradient|.

    `.mean(dim=0)` are its columns' saliencies (equation 3).

    Args:
        lm: the model, of any kind; it is left as it is.
        examples: the editing set.
        path: the matrix' module path, as a `ModuleSaliency` names it.
        batch_tokens: at most so many tokens, padding included, in one pass.
        progress: called with examples done.

    Raises:
        NotFiniteError: the loss or a gradient is NaN or infinite.
        RequestError: there is no example.
    """
    total = torch.zeros_like(weight_out_in(lm.module(path)), dtype=torch.float64)

    def take(_path: str, _number: int, magnitudes: Tensor) -> None:
        total.add_(magnitudes)

    _walk(lm, examples, [path], take, batch_tokens, lambda d, n: progress("gradients", d, n))
    return _finite(lm, total, path) / len(examples)


_Take = Callable[[str, int, Tensor], None]
"""Called with a matrix' path, an example's number and that example's |gradient| (d_out, d_in)."""


def _paths(lm: LanguageModel, layer: int, modules: Modules) -> list[str]:
    """The module paths of the matrices that stand for a block."""
    paths = [lm.mlp_in_path(layer), lm.mlp_out_path(layer)]
    return paths if modules == "mlp" else [*paths, lm.attention_out_path(layer)]


def _each(
    lm: LanguageModel,
    examples: Sequence[Example],
    paths: Sequence[str],
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> Tensor:
    """(n, matrices) each example's mean |gradient| over each matrix; float64."""
    table = torch.zeros(len(examples), len(paths), dtype=torch.float64)
    column = {path: i for i, path in enumerate(paths)}

    def take(path: str, number: int, magnitudes: Tensor) -> None:
        table[number, column[path]] = magnitudes.mean()

    _walk(lm, examples, paths, take, batch_tokens, progress)
    for path, values in zip(paths, table.T, strict=True):
        _finite(lm, values, path)
    return table


def _standardised(found: Tensor, neutral: Tensor) -> Tensor:
    """Mean over examples of (s - mean) / std, both (n, quantities), std unbiased."""
    std = neutral.std(dim=0)
    return (found.mean(dim=0) - neutral.mean(dim=0)) / std.where(std > SMALLEST_STD, 1.0)


def _walk(
    lm: LanguageModel,
    examples: Sequence[Example],
    paths: Sequence[str],
    take: _Take,
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> None:
    """Hand every example's |gradient| of every matrix to `take`, one at a time."""
    if not examples:
        raise RequestError("there is no example to compute gradients for; give at least one.")
    done = 0
    for group in example_batches(lm, examples, batch_tokens):
        with _gradients(lm, paths, group, take):
            loss = losses(lm, [examples[i] for i in group])
            if not loss.isfinite().all():
                lm.check_finite()
                worst = examples[group[int(loss.isfinite().int().argmin())]]
                raise NotFiniteError(
                    f"{lm.name} gives {worst.answer!r} after {worst.prompt!r} a loss that is not "
                    "finite: its dtype overflows (try float32 or bfloat16)."
                )
            torch.autograd.backward(loss.sum())
        done += len(group)
        progress(done, len(examples))


@contextmanager
def _gradients(
    lm: LanguageModel, paths: Sequence[str], numbers: Sequence[int], take: _Take
) -> Iterator[None]:
    """While open, a backward pass gives `take` each row's |gradient| of each matrix in turn.

    `numbers` says which example each row of the batch is.
    """

    def watched(path: str) -> Callable[[Tensor], Tensor]:
        def hook(deltas: Tensor) -> None:
            inputs = seen.inputs.pop(path).detach()
            for number, delta, x in zip(numbers, deltas, inputs, strict=True):
                take(path, number, _gradient(delta, x).abs_())

        def watch(output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing below asks for a gradient: weights are frozen
                output.requires_grad_()
            output.register_hook(hook)  # type: ignore[no-untyped-call]
            return output

        return watch

    modules = {path: lm.module(path) for path in paths}
    with frozen(lm), captured(modules) as seen, ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(rewritten_output(module, watched(path)))
        yield


def _gradient(delta: Tensor, x: Tensor) -> Tensor:
    """(d_out, d_in) from (t, d_out) and (t, d_in), in float32 or wider."""
    dtype = torch.promote_types(delta.dtype, torch.float32)
    return delta.to(dtype).T @ x.to(dtype)


def _finite(lm: LanguageModel, values: Tensor, path: str) -> Tensor:
    if not values.isfinite().all():
        raise NotFiniteError(
            f"the gradient of {path} in {lm.name} is NaN or infinite; the dtype is too narrow for "
            "it: load the model in float32 or bfloat16."
        )
    return values
