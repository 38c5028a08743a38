"""What stands before a prompt, so that an edit does not hang on one wording alone."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from errata.lm.generate import random_prefixes
from errata.lm.load import LanguageModel


class Contexts:
    """Nothing, and then texts that are given or, where none is, random prefixes.

    Random ones are written by the model itself, once: later edits of it use the same ones.
    """

    def __init__(
        self, given: Sequence[str], prefixes: Sequence[tuple[int, int]], *, seed: int
    ) -> None:
        """Keep what they are made from.

        Args:
            given: contexts as text.
            prefixes: (how many, of how many tokens) each, in turn.
            seed: of the sampling.
        """
        self.given = given
        self.prefixes = prefixes
        self.seed = seed
        self._written: WeakKeyDictionary[PreTrainedModel, list[str]] = WeakKeyDictionary()

    def of(self, lm: LanguageModel) -> list[str]:
        """The contexts of a model, the empty one first."""
        if self.given:
            return ["", *(text for text in self.given if text)]
        if lm.network not in self._written:
            self._written[lm.network] = [
                prefix
                for i, (count, length) in enumerate(self.prefixes)
                for prefix in random_prefixes(
                    lm, count=count, length=length, seed=self.seed + 1000 * i
                )
            ]
        return ["", *self._written[lm.network]]
