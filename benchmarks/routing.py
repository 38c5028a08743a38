"""How well SCEN's indexing neurons tell prompts apart, without any expert: losses, blocks, theta.

For each setting the neurons of a stream of facts are trained as `Scen` trains them. Then, at each
threshold: how many of the facts' own prompts, and of their paraphrases, reach the right neuron, and
how many neighbours reach none. Seconds, where whole streams take hours.

    python -m benchmarks.routing                    the pocket model, 200 facts
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from errata.editors import Background
from errata.editors.memory.scen import Scen, ScenConfig, inputs_at_prompts
from errata.jobs.cases import read_cases
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.requests import Case

KEPT = (0.5, 0.8, 0.9, 0.97)
"""Thresholds are named by the share of neighbours that they leave alone."""


def main() -> None:
    """Print a line for each loss, block and threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--losses", nargs="+", default=["paper", "reference", "hinge"])
    options = parser.parse_args()
    lm = LanguageModel.load(options.model)
    cases = read_cases(options.model, options.facts)
    print(
        "layer | loss | theta | neighbours left alone | own prompt | paraphrase | same subject left"
    )
    for layer in options.layers:
        groups = asked(lm, lm.mlp_out_path(layer), cases)
        for loss in options.losses:
            neurons = stream(ScenConfig(loss=loss), cases, groups[0])
            for kept in KEPT:
                print(f"{layer} | {loss} | {line(neurons, groups, kept)}", flush=True)


def asked(lm: LanguageModel, path: str, cases: Sequence[Case]) -> list[Tensor]:
    """(n, d_in) the matrix' inputs at prompts, paraphrases, neighbours, facts of one subject."""
    texts = [
        [case.request.text for case in cases],
        [case.paraphrases[0] for case in cases],
        [case.neighbours[0].prompt for case in cases],
        [case.same_subject[0].prompt for case in cases],
    ]
    return [
        inputs_at_prompts(lm, path, [Example(text.rstrip(), "x") for text in group])
        for group in texts
    ]


def stream(config: ScenConfig, cases: Sequence[Case], own: Tensor) -> Tensor:
    """(n, d_in) neurons, each trained against all earlier prompts."""
    editor = Scen(config, Background())
    return torch.stack(
        [
            editor.neuron(own[t : t + 1], own[:t], zlib.crc32(case.request.text.encode()))
            for t, case in enumerate(cases)
        ]
    )


def line(neurons: Tensor, groups: Sequence[Tensor], kept: float) -> str:
    """What comes of a threshold that leaves this share of the neighbours alone."""
    found = [(group @ neurons.mT).sigmoid().max(dim=1) for group in groups]
    theta = float(found[2].values.quantile(kept))
    number = torch.arange(len(neurons))
    right = [
        float(((largest > theta) & (which == number)).float().mean())
        for largest, which in found[:2]
    ]
    left = [float((largest <= theta).float().mean()) for largest, _ in found[2:]]
    return f"{theta:.3f} | {left[0]:.0%} | {right[0]:.0%} | {right[1]:.0%} | {left[1]:.0%}"


if __name__ == "__main__":
    main()
