"""Background: what a method may know about a model beside the requests, above all ordinary text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from errata.editors.closed_form.corpus import Corpus, own_text, read_corpus
from errata.editors.closed_form.moments import Moments
from errata.editors.closed_form.statistics import collect
from errata.editors.closed_form.targets import Targets
from errata.lm.load import LanguageModel
from errata.progress import Progress, silent


@dataclass(eq=False)
class Background:
    """Ordinary text of the kind that the model knows, and what follows from it.

    Moments are taken once per network, of its weights at that time, and kept for later edits: what
    is to be preserved is what the model said before the first of them.
    """

    corpus: str | Path | Iterable[str] | None = None
    """Anything that `read_corpus` reads; None lets the model write its own text."""
    tokens: int = 100_000
    """How much of it is read."""
    cache: Path | None = None
    """A folder in which moments are kept from run to run."""
    given: Moments | None = None
    """Moments that are there already; then no text is read."""
    remember: int = 0
    """How many sets of targets of the unedited model are kept for later edits: for studies, in
    which methods and batch sizes share them. The weights must then change by edits alone."""
    _moments: WeakKeyDictionary[PreTrainedModel, dict[int, Moments]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )
    _targets: WeakKeyDictionary[PreTrainedModel, dict[Hashable, Targets]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def text(self, lm: LanguageModel, tokens: int) -> Corpus:
        """The ordinary text; of a model that writes its own, about so many tokens.

        Raises:
            DatasetError: there is no such text.
        """
        return own_text(lm, tokens) if self.corpus is None else read_corpus(self.corpus)

    def moments(
        self, lm: LanguageModel, layers: Sequence[int], *, progress: Progress = silent
    ) -> dict[int, Moments]:
        """Second moments of the keys at each of `layers`; layers not seen yet in one pass.

        Raises:
            MomentError: there is too little text, or the given moments lack a layer.
            NotFiniteError: the model gives NaN or infinite keys.
        """
        if self.given is not None:
            return dict.fromkeys(layers, self.given)
        known = self._moments.setdefault(lm.network, {})
        if missing := [layer for layer in layers if layer not in known]:
            found = collect(
                lm,
                missing,
                self.text(lm, self.tokens),
                tokens=self.tokens,
                cache=self.cache,
                progress=progress,
            )
            known |= dict.fromkeys(missing, found)
        return {layer: known[layer] for layer in layers}

    def targets(self, lm: LanguageModel, asked: Hashable, find: Callable[[], Targets]) -> Targets:
        """Targets on the model as it is now: remembered if it is unedited, else found.

        Args:
            lm: the model.
            asked: all that they depend on, beside the model.
            find: computes them.
        """
        if not self.remember or lm.applied:
            return find()
        known = self._targets.setdefault(lm.network, {})
        if asked not in known:
            found = find()
            while len(known) >= self.remember:
                del known[next(iter(known))]  # the oldest
            known[asked] = found
        return known[asked]
