"""A server that a user starts stores the shards of the requests that ask for it, and says so in its replies.

Shapes: S tokens of a sample, F aux layers, H hidden size.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.exposed import open_sockets
from tests.integration.standalone_harness import ServedModel, command, environment, served_model
from tests.integration.store_harness import RunningStore, running_store
from torchspec.inference.capture.protocol import capture_rid, decode_captured
from torchspec.shards import ShardFormula
from torchspec.store.geometry import SampleGeometry, shard_suffix, shard_tensors
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.target.shape import early_middle_late

AUX_LAYERS = early_middle_late(30)
SHARDING = ShardFormula(ulysses_size=2, ring_size=2, layout="zigzag", halo=3)
MAX_LENGTH, HIDDEN = 200, 576
TOLERANCE = 2e-4
"""Relative error of a token's state in fp32, as in ``test_capture.py``."""
VARIABLES = {
    "TORCHSPEC_USP_SHARDED_MOONCAKE": "1",
    "TORCHSPEC_USP_SP_SIZE": "4",
    "TORCHSPEC_USP_RING_SIZE": "2",
    "TORCHSPEC_USP_LAYOUT": "zigzag",
    "TORCHSPEC_USP_TTT_LENGTH": "3",
    "TORCHSPEC_USP_MAX_SEQ_LENGTH": str(MAX_LENGTH),
    "MOONCAKE_LOCAL_BUFFER_SIZE": str(16 << 20),
}
ARGUMENTS = (
    *("--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"),
    *("--return-aux-hidden-state-layer-ids", *map(str, AUX_LAYERS)),
    *("--disable-radix-cache", "--max-running-requests", "4", "--max-total-tokens", "2048"),
    *("--chunked-prefill-size", "64", "--sleep-on-idle", "--log-level", "warning"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    with running_store(tmp_path_factory.mktemp("store"), 64 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def server(store: RunningStore, target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    log = tmp_path_factory.mktemp("server") / "log"
    with served_model(log, target_path, *ARGUMENTS, MOONCAKE_MASTER=store.endpoint.master, **VARIABLES) as server:
        yield server


def test_nobody_else_can_reach_it(server: ServedModel) -> None:
    family = psutil.Process().children(recursive=True)
    assert any("sglang" in process.name() for process in family)
    assert set[str]().union(*map(open_sockets, family)) == set()


def prompt(length: int) -> list[int]:
    return torch.randint(0, 49152, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def assert_close(states: Tensor, expected: Tensor) -> None:
    assert ((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE


def check_shards(client: HiddenStateStore, entry: dict[str, Any], read: list[int], model: Any) -> None:
    """Each rank's shard has the rows of its segments, and together they are what transformers computes."""
    with torch.inference_mode():
        states = model.model(torch.tensor([read]), output_hidden_states=True).hidden_states
    expected = {
        "hs": torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1),
        "lhs": states[-1][0],
        "ids": torch.tensor(read),
    }
    captured, owned = decode_captured(entry), []
    assert {suffix: spec.shape for suffix, spec in captured.tensors.items()} == {
        suffix: tuple(tensor.shape) for suffix, tensor in expected.items()
    }
    stored_bytes = 0
    for rank in range(SHARDING.size):
        tensors = shard_tensors(captured.tensors, SHARDING, len(read), rank)
        buffer = client.get(entry["key"], tensors, timeout=10)
        stored_bytes += sum(view.nbytes for view in buffer.views.values())
        segments = SHARDING.segments(len(read), rank)
        own = [row for segment in segments for row in range(segment.start, segment.stop)]
        with_halo = [row for segment in segments for row in range(segment.start, segment.halo_stop)]
        shard = {suffix: buffer.views[shard_suffix(rank, suffix)] for suffix in expected}
        assert shard["ids"].tolist() == expected["ids"][with_halo].tolist()
        assert_close(shard["lhs"], expected["lhs"][with_halo])
        hs_SFH, expected_SFH = (t.view(len(own), len(AUX_LAYERS), -1) for t in (shard["hs"], expected["hs"][own]))
        assert_close(hs_SFH, expected_SFH)
        client.release(buffer)
        client.remove(entry["key"], tensors)
        owned += own
    assert sorted(owned) == list(range(len(read)))
    assert entry["bytes"] == stored_bytes


def test_a_reply_says_what_was_stored_and_every_rank_finds_its_shard(server, client, target_path) -> None:  # type: ignore[no-untyped-def]
    metadata = {"has_thinking": True, "source": "a.jsonl"}
    with ThreadPoolExecutor(4) as clients:
        plain = clients.submit(server.generate, "not-for-the-store", prompt(30), max_new_tokens=12)
        asked = {
            ("read", 137): clients.submit(
                server.generate,
                capture_rid("read"),
                prompt(137),
                max_new_tokens=1,
                custom_params={"metadata": metadata},
            ),
            ("answered", 41): clients.submit(server.generate, capture_rid("answered"), prompt(41), max_new_tokens=9),
        }
    model = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
    for (key, length), reply in asked.items():
        status, answer = reply.result()
        entry = answer["meta_info"]["torchspec"]
        assert status == 200 and (entry["stored"], entry["key"], entry["usp_sharded"]) == (True, key, True)
        assert decode_captured(entry).sharding == SHARDING
        assert (entry.get("has_thinking"), entry.get("source")) == (
            (True, "a.jsonl") if key == "read" else (None, None)
        )
        check_shards(client, entry, prompt(length) + answer["output_ids"][:-1], model)
    status, answer = plain.result()
    assert status == 200 and len(answer["output_ids"]) == 12 and "torchspec" not in answer["meta_info"]


def test_what_cannot_be_stored_is_refused_or_said(server, client) -> None:  # type: ignore[no-untyped-def]
    rid = capture_rid("long")
    status, answer = server.generate(rid, prompt(MAX_LENGTH), max_new_tokens=2)
    assert status == 400 and f"TORCHSPEC_USP_MAX_SEQ_LENGTH={MAX_LENGTH}" in answer["error"]["message"]
    status, answer = server.generate(rid, prompt(MAX_LENGTH), max_new_tokens=1)
    assert status == 200 and answer["meta_info"]["torchspec"]["stored"]
    status, answer = server.generate(rid, prompt(9), max_new_tokens=1, custom_params={"metadata": {"mine": 1}})
    entry = answer["meta_info"]["torchspec"]
    assert status == 200 and (entry["stored"], entry["mine"]) == (False, 1) and "under this key" in entry["reason"]
    whole = SampleGeometry(len(AUX_LAYERS), HIDDEN, "float32").tensors(MAX_LENGTH)
    first = client.get("long", shard_tensors(whole, SHARDING, MAX_LENGTH, 0), timeout=10)
    assert first.views["usp0_ids"][:5].tolist() == prompt(MAX_LENGTH)[:5]  # the first request's, untouched
    client.release(first)
    assert server.generate("after", prompt(5), max_new_tokens=2)[0] == 200


@pytest.mark.parametrize(
    ("variables", "arguments", "named"),
    [
        pytest.param(  # the words of every other variable: tests/unit/inference/standalone/test_config.py
            {"TORCHSPEC_USP_RING_SIZE": "3"},
            ARGUMENTS,
            "TORCHSPEC_USP_RING_SIZE=3 must divide TORCHSPEC_USP_SP_SIZE=4",
            marks=pytest.mark.slow,
        ),
        ({}, [a for a in ARGUMENTS if a != "--disable-radix-cache"], "--disable-radix-cache"),
    ],
)
def test_a_server_that_could_not_store_does_not_start(variables, arguments, named, target_path) -> None:  # type: ignore[no-untyped-def]
    variables = VARIABLES | {"MOONCAKE_MASTER": "127.0.0.1:1"} | variables
    ended = subprocess.run(
        command(target_path, *arguments), env=environment(**variables), capture_output=True, text=True, timeout=200
    )
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1 and len(errors) == 1 and named in errors[0]
    assert "Traceback" not in ended.stderr


class Sent:
    """Records what SGLang's streamer would send."""

    def __init__(self) -> None:
        self.rids: list[list[str]] = []

    def stream(self, _streamer: Any, reqs: list[Any], _return_logprob: bool, _skip_req: Any = None) -> None:
        self.rids.append([req.rid for req in reqs])


def test_a_reply_is_held_until_its_states_are_stored_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    from torchspec.inference.standalone import streamer as holding_streamer

    sent = Sent()
    base = holding_streamer.SchedulerOutputStreamer
    monkeypatch.setattr(base, "stream_output", lambda *args: sent.stream(*args))
    monkeypatch.setattr(base, "__init__", lambda self: self.__post_init__())
    monkeypatch.setattr(base, "__post_init__", lambda self: None)
    streamer = holding_streamer.HoldingStreamer()
    finished, running = (
        SimpleNamespace(rid=rid, finished=lambda done=done: done, return_logprob=False)
        for rid, done in ((capture_rid("a"), True), (capture_rid("b"), False))
    )
    other = SimpleNamespace(rid="c", finished=lambda: True, return_logprob=False)
    outcome: Future = Future()
    streamer.expect("a", outcome)
    for _ in range(2):  # SGLang may offer a finished request again
        streamer.stream_output([finished, running, other], False)
        streamer.release()
    assert sent.rids == [[running.rid, "c"]] * 2 and streamer.wait_for_held()
    outcome.set_result({"stored": True})
    streamer.release()
    streamer.release()
    assert sent.rids[2:] == [[finished.rid]] and not streamer.wait_for_held()
    info = streamer.build_additional_customized_info([running, finished, other])
    assert info == {"torchspec": [[], [{"stored": True}], []]}
    aborted = SimpleNamespace(rid=capture_rid("d"), finished=lambda: True)
    ((message,),) = streamer.build_additional_customized_info([aborted])["torchspec"]
    assert not message["stored"] and message["key"] == "d" and "ended before" in message["reason"]
