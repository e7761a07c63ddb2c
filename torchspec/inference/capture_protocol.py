"""What the engine's parent process and the capture plugin inside its scheduler say to each other.

The parent passes a :class:`CaptureConfig` down in one environment variable, which is how it reaches a spawned
process. The plugin answers over an AF_UNIX socket, one JSON object a line:

    {"type": "hello", "aux_layers": [..], "num_layers": .., "hidden_size": .., "dtype": ..}     once, on loading
    {"type": "captured", "key": .., "tensors": {suffix: [global shape, dtype]}, "bytes": .., "put_seconds": ..,
     "sharding": {..} or null}
    {"type": "failed", "key": .., "reason": ..}

A request is captured when its id says so. Ids end in a colon because SGLang aborts by prefix, and no id may be
another's prefix.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torchspec.contracts import TensorSpec
from torchspec.parallel.shards import ShardFormula
from torchspec.store.endpoint import StoreEndpoint

ENVIRONMENT_VARIABLE = "TORCHSPEC_CAPTURE"
_PREFIX = "capture:"


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """Where the plugin connects, and how much registered host memory it may use for samples on their way out."""

    socket: str
    endpoint: StoreEndpoint
    buffer_bytes: int
    sharding: ShardFormula | None = None
    """Store each sequence-parallel rank's shard of a sample by itself."""

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"endpoint": self.endpoint.to_json()})

    @classmethod
    def from_json(cls, text: str) -> CaptureConfig:
        fields = json.loads(text)
        endpoint = StoreEndpoint.from_json(fields["endpoint"])
        return cls(fields["socket"], endpoint, fields["buffer_bytes"], _sharding(fields["sharding"]))


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


def capture_rid(key: str) -> str:
    """The request id that asks for a capture under ``key``."""
    return f"{_PREFIX}{key}:"


def captured_key(rid: str) -> str | None:
    """The store key of a capture request, ``None`` for any other."""
    return rid[len(_PREFIX) : -1] if rid.startswith(_PREFIX) else None


def encode_captured(key: str, captured: Captured) -> dict[str, object]:
    """The message that says ``captured``."""
    tensors = {suffix: (spec.shape, spec.dtype) for suffix, spec in captured.tensors.items()}
    return {
        "type": "captured",
        "key": key,
        "tensors": tensors,
        "bytes": captured.num_bytes,
        "put_seconds": captured.put_seconds,
        "sharding": None if captured.sharding is None else asdict(captured.sharding),
    }


def decode_captured(message: dict) -> Captured:
    """Inverse of :func:`encode_captured`."""
    tensors = {suffix: TensorSpec(tuple(shape), dtype) for suffix, (shape, dtype) in message["tensors"].items()}
    return Captured(tensors, message["bytes"], message["put_seconds"], _sharding(message["sharding"]))


def _sharding(fields: dict[str, Any] | None) -> ShardFormula | None:
    return None if fields is None else ShardFormula(**fields)
