"""Another process joins a run's cluster as its driver did, whatever its own environment says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from torchspec.driver.cluster import set_auth_mode
from torchspec.driver.remote import connect
from torchspec.run_folder import RunFolder, this_process


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Ray has as it had it, for the tests that come after."""
    yield
    set_auth_mode("token")


@pytest.mark.parametrize(
    ("address", "mode", "environment"),
    [("127.0.0.1:6400", "token", "disabled"), ("10.0.0.1:6379", "disabled", "token")],
)
def test_a_cluster_is_joined_as_the_driver_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, mode: str, environment: str
) -> None:
    run, seen = RunFolder(tmp_path), []
    run.config.touch()
    run.handle.write_text(json.dumps({"address": address, "namespace": "n", "auth_mode": mode, **this_process()}))

    def init(address: str, **_: object) -> None:
        seen.append((address, is_token_auth_enabled(), ray_constants.ENABLE_RAY_CLUSTER))
        raise ConnectionError("nobody there")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_AUTH_MODE", environment)
    with pytest.raises(ValueError, match="does not answer: nobody there"), connect(tmp_path):
        pass
    assert seen == [(address, mode == "token", not address.startswith("127."))]
    assert ray_constants.ENABLE_RAY_CLUSTER and ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ


def test_the_token_is_asked_for_where_a_python_program_starts_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    set_auth_mode("disabled")
    assert not is_token_auth_enabled()
    set_auth_mode("token")
    assert is_token_auth_enabled() and os.environ["RAY_AUTH_MODE"] == "token"
