"""Background: what a method may know about a model beside the requests, above all ordinary text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from errata.editors.closed_form.statistics import Moments, collect, own_text
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
    _moments: WeakKeyDictionary[PreTrainedModel, dict[int, Moments]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

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
            corpus = own_text(lm, self.tokens, seed=0) if self.corpus is None else self.corpus
            found = collect(
                lm, missing, corpus, tokens=self.tokens, cache=self.cache, progress=progress
            )
            known |= dict.fromkeys(missing, found)
        return {layer: known[layer] for layer in layers}
