"""What the capture plugin is told and what it answers, as plain data.

An engine of a run is told by the process that started it: a :class:`CaptureConfig` in one environment variable, which
is how it reaches a spawned process. Its plugin answers over an AF_UNIX socket, one JSON object a line: a hello once,
on loading, and one message for each captured request. A server that a user started (``standalone/``) is told by
the user's environment, and the same message travels in the reply to the request:

    {"type": "hello", "aux_layers": [..], "num_layers": .., "hidden_size": .., "dtype": ..}
    {"stored": true, "key": .., "tensors": {suffix: {"shape": [..], "dtype": ..}}, "bytes": .., "put_seconds": ..,
     "usp_sharded": false}     or true, and "ulysses_size", "ring_size", "layout", "ttt_length"; shapes are global
    {"stored": false, "key": .., "reason": .., "kind": ..}      (``FailureKind``)

A request is captured when its id says so: ``capture:KEY:``, or ``capture:KEY:2x1-zigzag-7:`` for a sample to be split
over 2 Ulysses ranks times 1 ring rank with the halo of 7 TTT steps. Ids end in a colon because SGLang aborts by prefix,
and no id may be another's prefix.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from torchspec.contracts import FailureKind, TensorSpec
from torchspec.shards import ShardFormula
from torchspec.store.endpoint import StoreEndpoint

ENVIRONMENT_VARIABLE = "TORCHSPEC_CAPTURE"
CAPTURE_PREFIX = "capture:"
_SHARDING = {"ulysses_size": "ulysses_size", "ring_size": "ring_size", "layout": "layout", "ttt_length": "halo"}
"""Fields of a message to those of the formula; an EAGLE3 draft's halo is its ``ttt_length``."""
_CAPTURE_RID = re.compile(
    rf"{CAPTURE_PREFIX}(?P<key>[^:]+):(?:(?P<ulysses>\d+)x(?P<ring>\d+)-(?P<layout>\w+)-(?P<ttt>\d+):)?"
)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """Where the plugin connects, and how much registered host memory it may use for samples on their way out."""

    socket: str
    endpoint: StoreEndpoint
    buffer_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"endpoint": self.endpoint.to_json()})

    @classmethod
    def from_json(cls, text: str) -> CaptureConfig:
        told = json.loads(text)
        return cls(told["socket"], StoreEndpoint.from_json(told["endpoint"]), told["buffer_bytes"])


@dataclass(frozen=True, slots=True)
class Hello:
    """What the plugin found in its engine."""

    aux_layers: tuple[int, ...]
    num_layers: int
    hidden_size: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Captured:
    """A sample that is in the store."""

    tensors: dict[str, TensorSpec]
    """Suffix to global shape and dtype."""
    num_bytes: int
    put_seconds: float
    sharding: ShardFormula | None = None
    compute_seconds: float = 0.0
    """From the request to its last token. Filled in by who made the request, like the next one."""
    hold_seconds: float = 0.0
    """From there to the start of the put."""


class Parent:
    """The process that started the engine. Thread-safe."""

    def __init__(self, address: str):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._speaking = threading.Lock()

    def say(self, message: Message) -> None:
        with self._speaking:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def expect(self, _key: str, outcome: Future[Message]) -> None:
        """Say what came of a request once that is known."""
        outcome.add_done_callback(lambda done: self.say(done.result()))


def capture_rid(key: str, sharding: ShardFormula | None = None) -> str:
    """The request id that asks for a capture under ``key``, stored shard by shard if ``sharding`` says how."""
    rid = f"{CAPTURE_PREFIX}{key}:"
    if sharding is None:
        return rid
    return f"{rid}{sharding.ulysses_size}x{sharding.ring_size}-{sharding.layout}-{sharding.halo}:"


def captured_key(rid: str) -> str | None:
    """The store key of a capture request, ``None`` for any other."""
    match = _CAPTURE_RID.fullmatch(rid)
    return None if match is None else match["key"]


def captured_sharding(rid: str) -> ShardFormula | None:
    """How the sample of a capture request is to be split; ``None`` if its id does not say."""
    match = _CAPTURE_RID.fullmatch(rid)
    if match is None or match["layout"] is None:
        return None
    layout: Any = match["layout"]
    return ShardFormula(int(match["ulysses"]), int(match["ring"]), layout, int(match["ttt"]))


def encode_captured(key: str, captured: Captured) -> Message:
    """The message that says ``captured``."""
    sharding = captured.sharding
    return {
        "stored": True,
        "key": key,
        "tensors": {suffix: asdict(spec) for suffix, spec in captured.tensors.items()},
        "bytes": captured.num_bytes,
        "put_seconds": captured.put_seconds,
        "usp_sharded": sharding is not None,
        **({} if sharding is None else {wire: getattr(sharding, name) for wire, name in _SHARDING.items()}),
    }


def encode_failed(key: str, reason: str, kind: FailureKind = "retry") -> Message:
    """The message that there is no sample under ``key``, and what that calls for."""
    return {"stored": False, "key": key, "reason": reason, "kind": kind}


def decode_captured(message: Message) -> Captured:
    """Inverse of :func:`encode_captured`."""
    tensors = {name: TensorSpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in message["tensors"].items()}
    named = {name: message[wire] for wire, name in _SHARDING.items()} if message["usp_sharded"] else None
    sharding = None if named is None else ShardFormula(**named)
    return Captured(tensors, message["bytes"], message["put_seconds"], sharding)
