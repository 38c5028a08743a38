"""The tiny models in every dtype that edits must restore exactly."""

from __future__ import annotations

import pytest
import torch

from errata.lm.load import LanguageModel


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def any_lm(request: pytest.FixtureRequest, tiny_lm: LanguageModel) -> LanguageModel:
    """Each tiny model in each dtype."""
    tiny_lm.network.to(request.param)
    return tiny_lm
