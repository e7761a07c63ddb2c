"""Fixtures of the tests that run on a real store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from store_harness import RunningStore

from torchspec.store.hidden_state_store import HiddenStateStore


@pytest.fixture(scope="module")
def client(store: RunningStore) -> Iterator[HiddenStateStore]:
    """Reads what the module's ``store`` was given."""
    client = HiddenStateStore(store.endpoint, 16 << 20)
    yield client
    client.close()
