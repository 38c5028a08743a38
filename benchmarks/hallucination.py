r"""Made-up sentences of biographies, replaced one after another: what that does to perplexity.

The hallucination half of SCEN's Table 1 (Yao et al. 2024). After a passage about a person the model
is to write the true next sentence. Told is the perplexity of these sentences (WikiBio-E), of true
sentences that must stay (WikiBio-A) and of web text, before the stream of edits and after it. What
is too long for the model is left out.

    python -m benchmarks.hallucination --edits hallucination-edit.json \
        --accurate hall_accurates.json --texts hall_open_webtext.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from errata.edits.edit import Edit
from errata.edits.stack import Stack
from errata.errors import TokenizationError
from errata.jobs.methods import editor_for
from errata.jobs.models import as_model
from errata.jobs.moments import background_for
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.lm.tokens import encode
from errata.measure.datasets import scen, wikibio
from errata.measure.drift import drift, observe
from errata.measure.editing import answered


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name in ("edits", "accurate", "texts"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a file of SCEN's data")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--count", type=int, default=200, help="of edits, and of true sentences")
    parser.add_argument("--webtexts", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=["ft", "grace", "scen"])
    options = parser.parse_args()
    lm = as_model(options.model)
    cases = [
        case
        for case in wikibio.read(options.edits)
        if fits(lm, Example(case.request.text, case.request.target))
    ][: options.count]
    made_up = [Example(case.request.text, case.request.target) for case in cases]
    true = [Example(probe.prompt, probe.answer) for probe in scen.read_accurate(options.accurate)]
    true = [example for example in true if fits(lm, example)][: options.count]
    texts = scen.read_texts(options.texts, options.webtexts)
    before = observe(lm, [], texts, limit=64, window=lm.max_length)
    print(f"{len(cases)} edits, {len(true)} true sentences, {len(texts)} texts\n")
    print("| | WikiBio-E | WikiBio-A | web text |\n|---|---:|---:|---:|")

    def told(name: str) -> None:
        moved = drift(lm, before)
        web = moved.perplexity_after
        assert web is not None
        numbers = answered(lm, made_up).perplexity, answered(lm, true).perplexity, web.mean
        print(f"| {name} | {' | '.join(f'{n:,.2f}' for n in numbers)} |", flush=True)

    told("unedited")
    for method in options.methods:
        editor = editor_for(lm, method, None, background_for(lm))
        done: list[Edit] = []
        for case in cases:
            edit = editor.edit(lm, [case.request])
            edit.apply_(lm)
            done.append(edit)
        told(method)
        Stack(done).undo_(lm)


def fits(lm: LanguageModel, example: Example) -> bool:
    """Whether a model can read a prompt with its answer."""
    try:
        encode(lm, [f"{example.prompt} {example.answer}"])
    except TokenizationError:
        return False
    return True


if __name__ == "__main__":
    main()
