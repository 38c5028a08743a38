"""Where does a model keep facts? The jobs behind `errata locate`, and their files.

::

    found = tracing("pocket", facts_for("pocket"))      # Traces
    save(found, "tracing.json")
    load("tracing.json") == found
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from errata.edits.edit import as_json
from errata.errors import DatasetError, RequestError
from errata.jobs.ask import ANSWER_TOKENS
from errata.jobs.cases import demo_cases, one_case, read_cases, with_pocket_checks
from errata.jobs.files import write_text
from errata.jobs.layers import How, Recommendation, neutral_for, recommend_layers, window_for
from errata.jobs.locating.problems import Problems
from errata.jobs.locating.versus import Versus
from errata.jobs.models import is_pocket
from errata.jobs.record import now, versions
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.lm.weights import weight_out_in
from errata.locate.neurons import Effect, Neurons, check, knowledge_neurons
from errata.locate.saliency import Modules, Saliency, saliency
from errata.locate.tracing import Noise, Part, Skipped, Traces, trace_all
from errata.measure.metrics import reads
from errata.progress import Progress, silent
from errata.requests import Case, Request

__all__ = [
    "How",
    "KnowledgeNeurons",
    "Noise",
    "Recommendation",
    "Result",
    "Skipped",
    "facts_for",
    "load",
    "neurons",
    "recommend_layers",
    "salient",
    "save",
    "total_effect",
    "tracing",
    "window_for",
]


@dataclass(frozen=True)
class FactNeurons:
    """One fact's knowledge neurons, and what happens without and with more of them."""

    request: Request
    neurons: Neurons
    effect: Effect


@dataclass(frozen=True)
class KnowledgeNeurons:
    """The knowledge neurons of some facts."""

    model: str
    layers: int
    width: int
    """How many neurons a layer has."""
    facts: tuple[FactNeurons, ...]
    skipped: tuple[Skipped, ...]
    """Facts that the model does not know."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        record: dict[str, Any] = as_json(self)
        return record

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        facts = tuple(
            FactNeurons(
                Request.from_dict(fact["request"]),
                Neurons.from_dict(fact["neurons"]),
                Effect.from_dict(fact["effect"]),
            )
            for fact in values["facts"]
        )
        skipped = tuple(
            Skipped(Request.from_dict(one["request"]), one["predicted"], one["why"])
            for one in values["skipped"]
        )
        return cls(values["model"], values["layers"], values["width"], facts, skipped)


Result = Traces | Saliency | KnowledgeNeurons | Versus | Problems

RESULTS: dict[str, type[Result]] = {
    "tracing": Traces,
    "saliency": Saliency,
    "neurons": KnowledgeNeurons,
    "versus": Versus,
    "variants": Problems,
}
"""What `errata locate NAME` finds."""


def facts_for(
    lm: LanguageModel,
    source: Path | str | None = None,
    count: int | None = None,
    *,
    by_default: int = 6,
    subject: str | None = None,
    prompt: str | None = None,
    target: str | None = None,
    true: str | None = None,
) -> list[Case]:
    """The facts to look for: of a source, one by hand, or well-known ones of the pocket models.

    Args:
        lm: the model.
        source: as `read_cases` takes it.
        count: at most so many.
        by_default: how many well-known facts, where none are named.
        subject: of a fact by hand.
        prompt: of a fact by hand, which needs these two alone.
        target: what it should say; by default what is true, or the first word that it says now.
        true: what it says today.

    Raises:
        RequestError: no fact is named and the model is none of the pocket models, or the model
            says nothing after the prompt.
        DatasetError, RequestFileError: as `read_cases`.
    """
    if subject is not None and prompt is not None:
        text = Request.parse(prompt, subject, "?").text
        [said] = complete(lm, [text], new_tokens=ANSWER_TOKENS)
        cases = [one_case(subject, prompt, target or true or _first_word(lm, text, said), true)]
        return with_pocket_checks(cases, {text: said}) if is_pocket(lm) else cases
    if source is not None:
        cases = read_cases(source, count)
        return with_pocket_checks(cases) if is_pocket(lm) else cases
    if is_pocket(lm):
        return demo_cases(count or by_default)
    raise RequestError(
        f"no fact is named, and what {lm.name} knows is not known: give a file of facts, --cases, "
        "or --subject and --prompt."
    )


def tracing(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    window: int | None = None,
    severed: Part | None = None,
    noise: Noise | None = None,
    progress: Progress = silent,
) -> Traces:
    """Causal traces of every fact that the model knows, for states, MLPs and attentions.

    Args:
        lm: a decoder; it is left as it is.
        cases: the facts.
        window: how many layers' MLPs or attentions are restored at once; see `window_for`.
        severed: trace states alone, with this part kept as in the corrupted run.
        noise: what hides the subjects; the papers' by default.
        progress: called with (stage, done, total).

    Raises:
        RequestError: there is no fact, or the model knows none of them.
        ConfigError: the model is not a decoder.
    """
    found = trace_all(
        lm,
        [case.request for case in cases],
        kinds=("state",) if severed else ("state", "mlp", "attention"),
        window=window or window_for(lm),
        severed=severed,
        noise=noise,
        progress=progress,
    )
    _some_known(lm, found.traces, found.skipped)
    return found


def salient(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    neutral: Path | str | None = None,
    modules: Modules = "mlp",
    progress: Progress = silent,
) -> Saliency:
    """How large the gradients of the edits' loss are, layer by layer.

    Args:
        lm: the model; it is left as it is.
        cases: facts to be edited; the loss is that of their targets.
        neutral: ordinary facts to compare with, as `read_cases` reads them; the pocket models
            bring some, for other models there is no comparison by default.
        modules: which matrices of each block count.
        progress: called with (stage, done, total).

    Raises:
        RequestError: there is no fact.
    """
    requests = [case.request for case in cases]
    if neutral is None:
        ordinary = neutral_for(lm, requests)
    else:
        known = [case.request for case in read_cases(neutral)]
        ordinary = [Example(request.text, request.true or request.target) for request in known]
    return saliency(
        lm,
        [Example(request.text, request.target) for request in requests],
        neutral=ordinary,
        modules=modules,
        progress=progress,
    )


def neurons(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    factor: float = 2.0,
    progress: Progress = silent,
) -> KnowledgeNeurons:
    """Each fact's knowledge neurons, and what silencing and amplifying them does.

    They are found with the fact's prompt and paraphrases, and checked on these and on other facts:
    the case's neighbours and the subject's other facts.

    Args:
        lm: a decoder or a masked encoder; it is left as it is.
        cases: the facts. `true` is the answer that is looked for, and the model must give it; by
            default it is the first word that the model says.
        factor: by which neurons are amplified in the check.
        progress: called with (stage, done, total).

    Raises:
        RequestError: there is no fact, or none is known.
    """
    said = complete(lm, [case.request.text for case in cases], new_tokens=ANSWER_TOKENS)
    found: list[FactNeurons] = []
    skipped: list[Skipped] = []
    for done, (case, words) in enumerate(zip(cases, said, strict=True)):
        progress("facts", done, len(cases))
        request = case.request
        answer = request.true or _first_word(lm, request.text, words)
        if not reads(words, answer):
            says = words.strip()
            why = f"after {request.text!r} the model says {says!r}, not {answer.strip()!r}."
            skipped.append(Skipped(request, says, why))
            continue
        prompts = (request.text, *case.paraphrases)
        some = knowledge_neurons(lm, prompts, answer)
        others = [Example(p.prompt, p.answer) for p in (*case.neighbours, *case.same_subject)]
        asked = [Example(prompt, answer) for prompt in prompts]
        found.append(FactNeurons(request, some, check(lm, some, asked, others, factor=factor)))
    progress("facts", len(cases), len(cases))
    _some_known(lm, found, skipped)
    width = weight_out_in(lm.mlp_out(0)).shape[1]
    return KnowledgeNeurons(lm.name, lm.layers, width, tuple(found), tuple(skipped))


def total_effect(traces: Traces) -> tuple[float, float]:
    """P and P*, means over the facts."""
    facts = {trace.request: trace for trace in traces.traces}.values()
    return fmean(t.clean for t in facts), fmean(t.corrupted for t in facts)


def save(result: Result, path: Path | str) -> Path:
    """Write a result as JSON, with when and by which versions it was made.

    Raises:
        StorageError: the file cannot be written.
    """
    name = next(name for name, kind in RESULTS.items() if isinstance(result, kind))
    record = {"errata locate": name, "created": now(), "versions": versions()}
    text = json.dumps(record | {"result": result.to_dict()}, indent=1, ensure_ascii=False)
    return write_text(path, text + "\n")


def load(path: Path | str) -> Result:
    """Read what `save` wrote.

    Raises:
        DatasetError: there is no such file, or it is no result of `errata locate`.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return RESULTS[record["errata locate"]].from_dict(record["result"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is no result of `errata locate` that this errata can read ({error!r}). Make "
            "it anew."
        ) from error


def _some_known(lm: LanguageModel, known: Sequence[Any], skipped: Sequence[Skipped]) -> None:
    if not known and skipped:
        raise RequestError(
            f"{lm.name} knows none of these facts, so there is nothing to locate: {skipped[0].why}"
        )


def _first_word(lm: LanguageModel, text: str, said: str) -> str:
    """What a continuation begins with, without the punctuation behind it.

    Raises:
        RequestError: it begins with no word.
    """
    word = next(iter(said.split()), "").rstrip(".,;:!?")
    if not word:
        raise RequestError(
            f"{lm.name} says nothing after {text!r}; give the answer to look for ('true', --true)."
        )
    return word
