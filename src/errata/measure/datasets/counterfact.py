"""CounterFact (Meng et al. 2022): counterfactual edits with paraphrases and neighbours.

Three forms are read: the original; the same with our `same_subject_prompts` (`{"prompt",
"target"}`) and `reference_texts`; and EasyEdit's compact form with one rephrase and one locality
prompt. The compact form's rephrase is often a generation prompt rather than a paraphrase, so
paraphrase scores on it are not those of the papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.measure.datasets.records import Record, collect, load, sentence
from errata.requests import Case, Probe, Request


def read(path: Path | str, limit: int | None = None) -> list[Case]:
    """The first `limit` usable cases of a CounterFact file, original or compact.

    Records whose prompt does not name the subject exactly once are skipped; the log says how many.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return cases(load(path), source=str(path), limit=limit)


def cases(
    records: Sequence[Any], *, source: str = "CounterFact", limit: int | None = None
) -> list[Case]:
    """The same for records in memory; `source` names them in messages."""
    return collect(records, _case, source=source, limit=limit)


def _case(record: Record) -> Case:
    return _original(record) if "requested_rewrite" in record.values else _compact(record)


def _original(record: Record) -> Case:
    rewrite = record.inner("requested_rewrite")
    new, true = (rewrite.inner(key).text("str") for key in ("target_new", "target_true"))
    return Case(
        request=Request(rewrite.text("prompt"), rewrite.text("subject"), new, true),
        case_id=str(record.values.get("case_id", "")),
        relation=str(rewrite.values.get("relation_id", "")),
        paraphrases=record.texts("paraphrase_prompts"),
        neighbours=tuple(Probe(p, true) for p in record.texts("neighborhood_prompts")),
        attributes=tuple(Probe(p, new) for p in record.texts("attribute_prompts")),
        same_subject=tuple(
            Probe(other.text("prompt"), other.text("target"))
            for other in record.inners("same_subject_prompts")
        ),
        generation=record.texts("generation_prompts"),
        references=record.texts("reference_texts"),
    )


def _compact(record: Record) -> Case:
    prompt, subject = record.text("prompt"), record.text("subject")
    target, true = record.text("target_new"), record.text("ground_truth")
    neighbour = Probe(record.text("locality_prompt"), record.text("locality_ground_truth"))
    return Case(
        request=sentence(prompt, subject, target, true),
        case_id=str(record.values.get("case_id", "")),
        paraphrases=(record.text("rephrase_prompt"),),
        neighbours=(neighbour,),
    )
