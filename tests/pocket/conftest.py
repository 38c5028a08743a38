"""What the tests of the pocket encyclopedia share."""

from __future__ import annotations

import pytest

from errata.pocket.encyclopedia import Encyclopedia


@pytest.fixture(scope="package")
def shipped() -> Encyclopedia:
    """The one that comes with errata; read only."""
    return Encyclopedia.load()
