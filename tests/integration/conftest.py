"""Fixtures of the tests that run on a real store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.store_harness import RunningStore, running_store
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.hidden_state_store import HiddenStateStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    """A store of the module's own; modules that want another size or node define their own."""
    with running_store(tmp_path_factory.mktemp("store"), 64 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(store: RunningStore) -> StoreEndpoint:
    return store.endpoint


@pytest.fixture(scope="module")
def client(store: RunningStore) -> Iterator[HiddenStateStore]:
    """Reads what the module's ``store`` was given."""
    client = HiddenStateStore(store.endpoint, 16 << 20)
    yield client
    client.close()
