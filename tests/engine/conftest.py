"""One process group for all single-process engine tests."""

from __future__ import annotations

import pytest

from trainer.engine.process_group import join, leave


@pytest.fixture(scope="session")
def world():
    yield join("cpu", timeout_s=60)
    leave()
