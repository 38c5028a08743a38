"""What every editing method is: a thing that turns requests into an Edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from errata.editors.background import Background
from errata.editors.config import EditorConfig
from errata.edits.edit import Edit
from errata.errors import ConfigError, ErrataError, RequestError
from errata.lm.load import LanguageModel
from errata.progress import Progress, silent
from errata.requests import INJECTION, Request


class Editor(ABC):
    """Turns requests into an Edit. Leaves the model bit for bit as it found it.

    A method is a subclass; general code calls what stands here and never asks which one it is.
    """

    name: ClassVar[str]
    """As records call the method."""
    depth: ClassVar[tuple[float, float]]
    """Where to edit when no layers are given: first and last block over the depth."""
    variants: ClassVar[frozenset[str]] = frozenset({INJECTION})
    """Names in `VARIANTS` of what it can do with a target; `check_batch` refuses the others."""

    def __init__(self, config: EditorConfig, background: Background) -> None:
        """Keep the numbers and what is known of the model beside the requests.

        Args:
            config: the method's numbers.
            background: ordinary text of the model.
        """
        self.config = config
        self.background = background

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The blocks to edit.

        Raises:
            ConfigError: a layer is beyond the model's depth.
        """
        if not self.config.layers:
            first, last = (round(share * lm.layers) for share in self.depth)
            return tuple(range(first, min(last, lm.layers - 1) + 1))
        if self.config.layers[-1] >= lm.layers:
            raise ConfigError(
                f"{lm.name} has blocks 0 to {lm.layers - 1}, not {self.config.layers[-1]}."
            )
        return self.config.layers

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """Take of the model, as it is now, what all later edits need.

        `edit` does so by itself. Call it where the first edit may find the model changed already.

        Raises:
            ConfigError: the model and the method's numbers do not go together.
        """
        self.layers(lm)

    @abstractmethod
    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> Edit:
        """Compute the change that makes `lm` say what the requests want.

        The edit's notes tell, under `left out`, which requests failed while others did not.

        Raises:
            ConfigError: the model and the method's numbers do not go together.
            RequestError: there is no request, two contradict each other, or one is of a variant
                that is not among `variants`.
            NotFiniteError: the model, or what was made of it, holds NaN or infinity.
            TargetError: no request could be carried out.
        """

    def edit_each(
        self,
        lm: LanguageModel,
        batches: Sequence[Sequence[Request]],
        *,
        progress: Progress = silent,
    ) -> Iterator[Edit | ErrataError]:
        """An edit of its own for each batch, as if it were the only one; in order.

        A batch that fails gives its error instead of an edit.

        Raises:
            ConfigError: the model and the method's numbers do not go together.
            RequestError: a batch is empty, or two requests of one contradict each other.
        """
        self.prepare(lm, progress=progress)
        for batch in batches:
            try:
                yield self.edit(lm, batch)
            except (ConfigError, RequestError):
                raise
            except ErrataError as error:
                yield error
