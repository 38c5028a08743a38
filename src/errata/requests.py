"""What a model should say from now on, and how to check that it does.

A `Request` is one correction; a `Case` is a Request with the prompts that judge it. Files of
requests are JSON lines, one object a line:

    {"prompt": "{} has its capital in", "subject": "France", "target": "Lyon", "true": "Paris"}

A line may hold a case: `paraphrases` (texts), `neighbours` (objects with `prompt` and `answer`) and
the other fields of `Case` beside the request's.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from errata.errors import RequestError, RequestFileError

SLOT = "{}"

T = TypeVar("T")

UNLESS_DEFAULT = {"told": "unless default"}
"""Metadata of fields that came later: a record tells them only where they differ from the default,
so that files and hashes of what does not use them stay as they were."""


@dataclass(frozen=True)
class Variant:
    """What to do with a target: one of the editing problems of Hase et al. (arXiv:2301.04213)."""

    target: Literal["new", "hidden", "true"] = "new"
    """What the target is: any other answer; what the model says when noise hides the subject; or
    what is true."""
    minimised: bool = False
    """Whether the model should say the target less, instead of more."""
    open_ended: bool = False
    """Whether there is no point at which the target is reached, so that no optimisation of it ends
    early."""
    hidden: bool = False
    """Whether noise hides the subject (`errata.lm.noise`), while editing and while judging."""


INJECTION = "error-injection"
"""The variant of a request that names none."""

VARIANTS: Mapping[str, Variant] = {
    INJECTION: Variant(),
    "tracing-reversal": Variant("hidden"),
    "fact-erasure": Variant("true", minimised=True, open_ended=True),
    "fact-amplification": Variant("true", open_ended=True),
    "fact-forcing": Variant("true", hidden=True),
}


def variant_named(name: str) -> Variant:
    """What a variant means.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in VARIANTS:
        raise RequestError(f"there is no variant {name!r}; there are {', '.join(VARIANTS)}.")
    return VARIANTS[name]


@dataclass(frozen=True)
class Request:
    """One statement to write: after `text`, the model should say `target`.

    Of another `variant`, the model should say it less, more, or where noise hides the subject.

    Raises:
        RequestError: the prompt has not exactly one slot, a field is empty, or the variant is
            unknown or wants another target.
    """

    prompt: str
    """The statement up to its object, with one `{}` where the subject stands."""
    subject: str
    """Whom or what the statement is about; it fills the slot as it is, braces included."""
    target: str
    """What the model should say next, with or without a leading space."""
    true: str | None = None
    """What the model says today, where known; the alternative that scores compare with."""
    variant: str = field(default=INJECTION, metadata=UNLESS_DEFAULT)
    """What is to be done with the target: a name in `VARIANTS`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out."""
        for name in ("prompt", "subject", "target", "true"):
            value = getattr(self, name)
            if name == "true" and value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                raise RequestError(
                    f"the request's {name!r} must be a non-empty text, got {value!r}."
                )
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"the request's {name!r} holds half a character (a lone surrogate): {value!r}."
                ) from error
        if (slots := self.prompt.count(SLOT)) != 1:
            raise RequestError(
                f"the prompt {self.prompt!r} has {slots} slots '{{}}'; it needs exactly one, where "
                f"the subject {self.subject!r} stands."
            )
        if self.problem.target == "true" and self.true is None:
            raise RequestError(
                f"{self.variant} is about what the model says today; give it as 'true' for "
                f"{self.text!r}."
            )
        if self.problem.target == "true" and self.target.strip() != str(self.true).strip():
            raise RequestError(
                f"{self.variant} is about what is true: after {self.text!r} its target is "
                f"{self.true!r}, not {self.target!r}. Leave the target away."
            )

    @property
    def problem(self) -> Variant:
        """What the variant means."""
        return variant_named(self.variant)

    @property
    def wish(self) -> str:
        """What the model should say, in words: `Paris`, `not Paris` or `Paris, behind noise`."""
        target = self.target.strip()
        if self.problem.minimised:
            return f"not {target}"
        return f"{target}, behind noise" if self.problem.hidden else target

    def posed(self, variant: str, *, target: str | None = None) -> Self:
        """The same fact as another problem.

        Args:
            variant: a name in `VARIANTS`.
            target: by default what is true, where the variant is about that, else this request's.

        Raises:
            RequestError: there is no such variant, or what is true is not known.
        """
        if target is None and variant_named(variant).target == "true":
            target = self.true
        return replace(self, variant=variant, target=self.target if target is None else target)

    @property
    def text(self) -> str:
        """The prompt with the subject in its slot."""
        before, after = self.prompt.split(SLOT)
        return before + self.subject + after

    @property
    def span(self) -> tuple[int, int]:
        """Where the subject stands in `text`: first character, one past the last."""
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)

    @classmethod
    def parse(
        cls,
        prompt: str,
        subject: str,
        target: str,
        true: str | None = None,
        variant: str = INJECTION,
    ) -> Self:
        """A request whose prompt may also be an ordinary sentence with the subject in it.

        Raises:
            RequestError: there is no slot, and the subject occurs not at all or more than once.
        """
        if SLOT not in prompt and subject:
            found = prompt.count(subject)
            if found != 1:
                how = "does not occur" if not found else f"occurs {found} times"
                raise RequestError(
                    f"the subject {subject!r} {how} in the prompt {prompt!r}. Write '{{}}' where "
                    "it stands."
                )
            prompt = prompt.replace(subject, SLOT)
        return cls(prompt, subject, target, true, variant)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Read one record; `target_new`/`target_true` of the published formats are understood.

        A variant that is about what is true needs no target. Keys that say nothing about the
        request are passed over: published records have many.

        Raises:
            RequestError: a key is missing or given twice, or a value has the wrong type.
        """
        names = {"target_new": "target", "target_true": "true", "ground_truth": "true"}
        values: dict[str, Any] = {}
        for key, value in record.items():
            if isinstance(value, Mapping) and "str" in value:
                value = value["str"]
            name = names.get(key, key)
            if name in values and values[name] != value:
                raise RequestError(f"the record gives {name!r} twice, differently: {record!r}.")
            values[name] = value
        known = ("prompt", "subject", "target", "true", "variant")
        variant = values.setdefault("variant", INJECTION)
        if isinstance(variant, str) and VARIANTS.get(variant, Variant()).target == "true":
            values.setdefault("target", values.get("true"))
        if missing := [key for key in known[:3] if key not in values]:
            raise RequestError(
                f"the record lacks {', '.join(map(repr, missing))}; it has {sorted(record)}."
            )
        if wrong := [key for key in known[:3] if not isinstance(values[key], str)]:
            raise RequestError(f"{', '.join(map(repr, wrong))} must be text, got {record!r}.")
        return cls.parse(*(values.get(key) for key in known))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, str]:
        """The record that `from_dict` reads back."""
        record = {"prompt": self.prompt, "subject": self.subject, "target": self.target}
        if self.true is not None:
            record["true"] = self.true
        return record if self.variant == INJECTION else record | {"variant": self.variant}


@dataclass(frozen=True)
class Probe:
    """A complete prompt and the answer that belongs to it."""

    prompt: str
    answer: str

    @classmethod
    def from_dict(cls, record: Any, name: str = "probe") -> Self:
        """Read `{"prompt": ..., "answer": ...}`; `name` is what messages call it.

        Raises:
            RequestError: it is something else.
        """
        if not isinstance(record, Mapping) or not all(
            isinstance(record.get(key), str) for key in ("prompt", "answer")
        ):
            raise RequestError(
                f"{name!r} must hold objects with the texts 'prompt' and 'answer', got {record!r}."
            )
        return cls(record["prompt"], record["answer"])


@dataclass(frozen=True)
class Case:
    """A request with how to check it (CounterFact's fields, and ours)."""

    request: Request
    case_id: str = ""
    relation: str = ""
    paraphrases: tuple[str, ...] = ()
    """Other ways to ask the same; the new target must come here too."""
    neighbours: tuple[Probe, ...] = ()
    """Prompts about other subjects; each answer must stay."""
    attributes: tuple[Probe, ...] = ()
    """Subjects that truly have the new target."""
    same_subject: tuple[Probe, ...] = ()
    """Other facts about the edited subject; each answer must stay."""
    generation: tuple[str, ...] = ()
    """Beginnings from which the model writes on freely."""
    references: tuple[str, ...] = ()
    """Texts about what truly has the new target, to compare free text with (RS)."""

    @property
    def fact(self) -> tuple[str, str]:
        """What it is about: subject and relation."""
        return self.request.subject, self.relation

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Read one record: a request's, with any of this class's fields beside.

        Raises:
            RequestError: there is no request in it, or a field has the wrong type.
        """
        values: dict[str, Any] = {}
        for name in ("case_id", "relation"):
            values[name] = _typed(record, name, str, "")
        for name in ("paraphrases", "generation", "references"):
            found = _typed(record, name, list, [])
            if not all(isinstance(one, str) for one in found):
                raise RequestError(f"{name!r} must be a list of texts, got {found!r}.")
            values[name] = tuple(found)
        for name in ("neighbours", "attributes", "same_subject"):
            found = _typed(record, name, list, [])
            values[name] = tuple(Probe.from_dict(one, name) for one in found)
        return cls(Request.from_dict(record), **values)

    def to_dict(self) -> dict[str, Any]:
        """The record that `from_dict` reads back, without what is empty."""
        record: dict[str, Any] = {"case_id": self.case_id, "relation": self.relation}
        record |= self.request.to_dict()
        for name in ("paraphrases", "generation", "references"):
            record[name] = list(getattr(self, name))
        for name in ("neighbours", "attributes", "same_subject"):
            record[name] = [asdict(probe) for probe in getattr(self, name)]
        return {name: value for name, value in record.items() if value}


def _typed(record: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = record.get(name, default)
    if not isinstance(value, kind):
        raise RequestError(f"{name!r} must be of type {kind.__name__}, got {value!r}.")
    return value


def read_jsonl(path: Path | str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; blank lines are passed over.

    Raises:
        RequestFileError: the file cannot be read, or a line is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    except OSError as error:
        raise RequestFileError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise RequestFileError(f"{path}, line {number}: not UTF-8 text ({error}).") from error
        except RecursionError as error:
            raise RequestFileError(f"{path}, line {number}: nested too deeply.") from error
        except json.JSONDecodeError as error:
            raise RequestFileError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}). "
                "Each line must hold one complete JSON object."
            ) from error
        if not isinstance(record, dict):
            raise RequestFileError(
                f"{path}, line {number}: expected a JSON object, got {type(record).__name__}."
            )
        records.append((number, record))
    return records


def read_requests(path: Path | str) -> list[Request]:
    """The requests of a JSON-lines file.

    Raises:
        RequestFileError: the file holds no request, or a line is not one (the line is named).
    """
    return _read(path, Request.from_dict)


def read_case_lines(path: Path | str) -> list[Case]:
    """The cases of a JSON-lines file: requests, each with whatever it brings to be checked by.

    Raises:
        RequestFileError: the file holds no request, or a line is not a case (the line is named).
    """
    return _read(path, Case.from_dict)


def _read(path: Path | str, convert: Callable[[Mapping[str, Any]], T]) -> list[T]:
    found = []
    for number, record in read_jsonl(path):
        try:
            found.append(convert(record))
        except RequestError as error:
            raise RequestFileError(f"{path}, line {number}: {error}") from error
    if not found:
        raise RequestFileError(f"{path} holds no request; write one JSON object a line.")
    return found


def check_batch(
    requests: Sequence[Request], variants: Collection[str] = frozenset({INJECTION})
) -> None:
    """Refuse a batch that asks for two answers to one prompt, or for what a method cannot do.

    Args:
        requests: the batch.
        variants: those that the method honours.

    Raises:
        RequestError: the batch is empty, two of its requests contradict each other, or one is of a
            variant that is not among these.
    """
    if not requests:
        raise RequestError("there is no request to carry out.")
    wanted: dict[str, Request] = {}
    for request in requests:
        if request.variant not in variants:
            raise RequestError(
                f"this method does {', '.join(v for v in VARIANTS if v in variants)} alone, not "
                f"{request.variant}, which is asked for after {request.text!r}."
            )
        earlier = wanted.setdefault(request.text.rstrip(" "), request)
        if _asked(earlier) != _asked(request):
            raise RequestError(
                f"two requests contradict each other: after {request.text!r} one wants "
                f"{_told(earlier)}, another {_told(request)}. Keep one of them."
            )


def unique(requests: Iterable[Request]) -> list[Request]:
    """The requests in order, each prompt with its target once."""
    return list({(r.text.rstrip(" "), *_asked(r)): r for r in requests}.values())


def _asked(request: Request) -> tuple[str, str]:
    return request.target.strip(), request.variant


def _told(request: Request) -> str:
    target = repr(request.target.strip())
    return target if request.variant == INJECTION else f"{request.variant} of {target}"
