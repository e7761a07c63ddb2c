"""What the controller's process has to load, and whom its status shows."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from tests.integration.controller_harness import make_spec
from torchspec.contracts import WorkerReport
from torchspec.controller import objects
from torchspec.controller.controller import Controller
from torchspec.store.endpoint import StoreEndpoint


def test_the_controller_holds_metadata_only_and_loads_no_torch() -> None:
    code = "import sys, torchspec.controller.controller; print(*{'torch', 'transformers', 'sglang'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == []


def test_a_late_call_of_a_dead_worker_does_not_show_it_among_the_living(tmp_path, monkeypatch) -> None:
    class Store:
        def __init__(self, endpoint: StoreEndpoint):
            pass

        def close(self) -> None:
            pass

    async def scenario() -> None:
        controller = Controller(make_spec(StoreEndpoint("unused", metrics=""), tmp_path))
        await controller.begin()
        assert await controller.lease("w0", 1, WorkerReport("w0"))
        assert [report.worker for report in (await controller.status()).workers] == ["w0"]
        await controller.worker_lost("w0", True)
        assert await controller.lease("w0", 1, WorkerReport("w0")) == []
        assert (await controller.status()).workers == ()

    monkeypatch.setattr(objects, "StoreClient", Store)
    asyncio.run(scenario())
