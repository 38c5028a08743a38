"""How well SCEN's indexing neurons and GRACE's keys tell prompts apart, without expert or value.

For each setting the neurons of a stream of facts are trained as `Scen` trains them. Then, at each
threshold: how many of the facts' own prompts, and of their paraphrases, reach the right neuron, how
many neighbours reach none, and the mean of the three. Minutes, where whole streams take hours.

    python -m benchmarks.routing                    the pocket model, 200 facts
    python -m benchmarks.routing --model pocket-questions --data pocket-questions-taught
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from errata.editors import Background
from errata.editors.memory.scen import Scen, ScenConfig, inputs_at_prompts
from errata.jobs.cases import read_cases
from errata.jobs.models import as_model
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.requests import Case

KEPT = (0.5, 0.8, 0.9, 0.97)
"""Thresholds are named by the share of neighbours that they leave alone."""
RADII = (0.25, 0.4, 0.5, 0.6, 0.8)
"""Of GRACE's keys, as a share of their length."""
HEADER = "| layer | setting | theta or radius | neighbours left | own prompt | paraphrase | mean |"


def main() -> None:
    """Print a line for each loss, block and threshold, then for each radius."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--data", help="of the facts; by default the model's own")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--losses", nargs="+", default=["paper", "reference", "hinge"])
    parser.add_argument("--updates", type=int, nargs="+", default=[20], help="of a neuron")
    options = parser.parse_args()
    lm = as_model(options.model)
    cases = read_cases(options.data or options.model, options.facts)
    print(f"{HEADER}\n|---|---|---:|---:|---:|---:|---:|")
    for layer in options.layers:
        groups = asked(lm, lm.mlp_out_path(layer), cases)
        for loss in options.losses:
            for updates in options.updates:
                neurons = stream(ScenConfig(loss=loss, neuron_updates=updates), cases, groups[0])
                for line in by_threshold(neurons, groups):
                    print(f"| {layer} | {loss}, {updates} updates | {line} |", flush=True)
        for line in by_radius(groups):
            print(f"| {layer} | GRACE's keys | {line} |", flush=True)


def asked(lm: LanguageModel, path: str, cases: Sequence[Case]) -> list[Tensor]:
    """(n, d_in) the matrix' inputs at prompts; (3 n, d_in) at paraphrases; and at neighbours."""
    texts = [
        [case.request.text for case in cases],
        [text for case in cases for text in (case.paraphrases * 3)[:3]],
        [one.prompt for case in cases for one in case.neighbours[:4]],
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


def by_threshold(neurons: Tensor, groups: Sequence[Tensor]) -> Iterator[str]:
    """What comes of each threshold that leaves a share of the neighbours alone."""
    found = [(group @ neurons.mT).sigmoid().max(dim=1) for group in groups]
    for kept in KEPT:
        theta = float(found[2].values.quantile(kept))
        yield line(theta, [(one.values > theta, one.indices) for one in found], numbers(groups))


def by_radius(groups: Sequence[Tensor]) -> Iterator[str]:
    """What comes of each radius, where keys too near one another divide the way between them."""
    keys = groups[0]
    apart = torch.cdist(keys, keys).fill_diagonal_(torch.inf).amin(dim=1) / 2
    found = [torch.cdist(group, keys).min(dim=1) for group in groups]
    for radius in RADII:
        reach = torch.minimum(keys.norm(dim=1) * radius, apart)
        answers = [(one.values <= reach[one.indices], one.indices) for one in found]
        yield line(radius, answers, numbers(groups))


def numbers(groups: Sequence[Tensor]) -> list[Tensor]:
    """Which neuron or key each prompt, and each paraphrase, is to reach."""
    count = torch.arange(len(groups[0]))
    return [count, count.repeat_interleave(3)]


def line(at: float, found: Sequence[tuple[Tensor, Tensor]], right: Sequence[Tensor]) -> str:
    """Shares of neighbours that reach nothing, and of prompts and paraphrases that reach theirs."""
    own, other = (
        float((reached & (which == wanted)).float().mean())
        for (reached, which), wanted in zip(found, right, strict=False)
    )
    left = float((~found[2][0]).float().mean())
    mean = (own + other + left) / 3
    return f"{at:.3f} | {left:.0%} | {own:.0%} | {other:.0%} | {mean:.1%}"


if __name__ == "__main__":
    main()
