"""Fixtures that modules share: a store, a trainer's bench, a target and prompts for drafts in real servers.

Each module has its own. Harnesses that import torch are imported by whoever asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.store_harness import RunningStore, running_store
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.hidden_state_store import HiddenStateStore

if TYPE_CHECKING:
    from tests.integration.draft_harness import Target
    from tests.integration.trainer_harness import Bench
    from torchspec.evaluation.prompts import EvaluationPrompt


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


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    from tests.integration.trainer_harness import running_bench

    with running_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="module")
def target(target_path: Path) -> Target:
    from tests.integration.draft_harness import Target

    return Target.load(target_path)


@pytest.fixture(scope="module")
def prompts(target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvaluationPrompt]:
    """Of an evaluation; a draft learns the answers to all but the last."""
    from tests.integration.draft_harness import NUM_PROMPTS
    from torchspec.data.tokenize import ChatTokenizer
    from torchspec.evaluation.prompts import load_prompts

    return load_prompts("builtin:heldout", ChatTokenizer(target_path), tmp_path_factory.mktemp("cache"), NUM_PROMPTS)
