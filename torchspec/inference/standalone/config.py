"""What a stand-alone server is told by the user who starts it, and what it refuses. Needs no SGLang.

``docs/standalone.md`` tells users what is here: the environment variables, the server's arguments, a request's id and
metadata, and the reply. The variables of the shards are named as in lightseekorg/TorchSpec (pull request 93), those of
the store as in Mooncake's own configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.contracts import FailureKind
from torchspec.inference.capture.protocol import (
    CAPTURE_PREFIX,
    Captured,
    Message,
    captured_key,
    captured_sharding,
    encode_captured,
)
from torchspec.shards import ShardFormula
from torchspec.store.endpoint import P2P_HANDSHAKE, StoreEndpoint
from torchspec.store.geometry import SampleGeometry

SWITCH = "TORCHSPEC_USP_SHARDED_MOONCAKE"
META_INFO = "torchspec"
"""Where a reply's ``meta_info`` says what became of the request's states."""

_FLAGS: tuple[FailureKind, ...] = ("no_room", "no_store")
"""The kinds of failure that a reply tells apart, as names of booleans."""
_DEFAULTS = {
    "MOONCAKE_LOCAL_BUFFER_SIZE": str(1 << 30),  # Mooncake's own
    "MOONCAKE_PROTOCOL": "tcp",
    "MOONCAKE_TE_META_DATA_SERVER": P2P_HANDSHAKE,
}

_RESERVED = {*encode_captured("", Captured({}, 0, 0.0, ShardFormula(1, 1, "contiguous", 1))), "reason", *_FLAGS}


@dataclass(frozen=True, slots=True)
class StandaloneConfig:
    """What a user's environment says."""

    endpoint: StoreEndpoint
    buffer_bytes: int
    sharding: ShardFormula
    max_length: int
    """Most tokens of one sample."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> StandaloneConfig:
        """Read the variables.

        Raises:
            ValueError: one is missing or invalid; names it and its valid values.
        """
        if environ[SWITCH] != "1":
            raise ValueError(f"{SWITCH}={environ[SWITCH]} must be 1, or not be set")
        environ = _DEFAULTS | dict(environ)
        size = _read_count(environ, "TORCHSPEC_USP_SP_SIZE")
        ring_size = _read_count(environ, "TORCHSPEC_USP_RING_SIZE")
        if size % ring_size:
            raise ValueError(f"TORCHSPEC_USP_RING_SIZE={ring_size} must divide TORCHSPEC_USP_SP_SIZE={size}")
        layout: Any = _read_choice(environ, "TORCHSPEC_USP_LAYOUT", ("contiguous", "zigzag"))
        return cls(
            endpoint=_read_endpoint(environ),
            buffer_bytes=_read_count(environ, "MOONCAKE_LOCAL_BUFFER_SIZE"),
            sharding=ShardFormula(
                size // ring_size, ring_size, layout, _read_count(environ, "TORCHSPEC_USP_TTT_LENGTH")
            ),
            max_length=_read_count(environ, "TORCHSPEC_USP_MAX_SEQ_LENGTH"),
        )

    def check_request(self, rid: str, num_prompt_tokens: int, sampling: Mapping[str, Any]) -> None:
        """Refuse a request whose states could not be stored. ``sampling``: its ``sampling_params``.

        Raises:
            ValueError: the id, the length or the metadata will not do.
        """
        if not rid.startswith(CAPTURE_PREFIX):
            return
        if captured_key(rid) is None or captured_sharding(rid) is not None:
            raise ValueError(f"rid={rid!r} must be '{CAPTURE_PREFIX}KEY:' with a KEY that has no colon in it")
        if sampling.get("n", 1) != 1:
            raise ValueError(f"n={sampling['n']} must be 1 for the captured request {rid!r}")
        new = sampling.get("max_new_tokens")
        if new is None:
            raise ValueError(f"the captured request {rid!r} must say max_new_tokens; 1 stores the prompt alone")
        length = num_prompt_tokens + max(new, 1) - 1  # the last token is written and never read
        if length > self.max_length:
            raise ValueError(
                f"the captured request {rid!r} may come to {length} tokens ({num_prompt_tokens} of the prompt and "
                f"max_new_tokens={new} but for the last one), more than TORCHSPEC_USP_MAX_SEQ_LENGTH={self.max_length}"
            )
        _check_metadata(request_metadata(sampling))

    def check_server(
        self, aux_layers: list[int] | None, prefix_cache: bool, running: int | None, hidden: int, dtype: str
    ) -> None:
        """Refuse arguments of the server with which samples would not come out whole.

        Args:
            aux_layers: ``--return-aux-hidden-state-layer-ids``.
            running: ``--max-running-requests``.
            hidden: Size of the target's states.
            dtype: Of these, by torch's name.

        Raises:
            ValueError: names the argument.
        """
        if not aux_layers:
            raise ValueError(
                f"{SWITCH} needs --enable-return-aux-hidden-states --speculative-algorithm EAGLE3 "
                "--return-aux-hidden-state-layer-ids with the layers to store"
            )
        if prefix_cache:
            raise ValueError(f"{SWITCH} needs --disable-radix-cache: a prefix from a cache has no hidden states")
        if running is None:
            raise ValueError(f"{SWITCH} needs --max-running-requests: each one takes room in the buffer")
        # One more: a slot has a row for each token that may be written, the last one included.
        needed = running * SampleGeometry(len(aux_layers), hidden, dtype).slot_bytes(self.max_length + 1)
        if needed > self.buffer_bytes:
            raise ValueError(
                f"MOONCAKE_LOCAL_BUFFER_SIZE={self.buffer_bytes} must be at least {needed} for --max-running-requests "
                f"{running} samples of TORCHSPEC_USP_MAX_SEQ_LENGTH={self.max_length} tokens"
            )


def request_metadata(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that a request brings along: ``metadata`` in the ``custom_params`` of its sampling parameters."""
    return (sampling.get("custom_params") or {}).get("metadata") or {}


def reply_entry(metadata: Mapping[str, Any], outcome: Message) -> dict[str, Any]:
    """What a reply says of its request's states, with all of the request's ``metadata``.

    :meth:`StandaloneConfig.check_request` made sure that no name is in both.
    """
    entry = dict(outcome)
    kind = entry.pop("kind", None)
    if kind is not None:
        entry |= {flag: flag == kind for flag in _FLAGS}
    assert not metadata.keys() & entry.keys()
    return {**metadata, **entry}


def _check_metadata(metadata: object) -> None:
    scalars = (str, int, float, bool, type(None))
    if not isinstance(metadata, dict) or not all(isinstance(value, scalars) for value in metadata.values()):
        raise ValueError("custom_params.metadata must be an object of strings, numbers, booleans and nulls")
    taken = sorted(metadata.keys() & _RESERVED)
    if taken:
        raise ValueError(
            f"custom_params.metadata must not name {', '.join(taken)}: the reply says there what was stored "
            f"({', '.join(sorted(_RESERVED))})"
        )


def _read_endpoint(environ: Mapping[str, str]) -> StoreEndpoint:
    master = _read(environ, "MOONCAKE_MASTER", "the HOST:PORT of the store's master")
    host, colon, port = master.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError(f"MOONCAKE_MASTER={master} must be the HOST:PORT of the store's master")
    return StoreEndpoint(
        master=master,
        metrics="",  # asked for by those who watch the store's fill level
        metadata=environ["MOONCAKE_TE_META_DATA_SERVER"],
        protocol=_read_choice(environ, "MOONCAKE_PROTOCOL", ("tcp", "rdma")),
        local_hostname=environ.get("MOONCAKE_LOCAL_HOSTNAME"),
    )


def _read(environ: Mapping[str, str], name: str, valid: str) -> str:
    if not environ.get(name):
        raise ValueError(f"{name} is not set; it must be {valid}")
    return environ[name]


def _read_count(environ: Mapping[str, str], name: str) -> int:
    text = _read(environ, name, "a positive integer")
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"{name}={text} must be a positive integer")
    return int(text)


def _read_choice(environ: Mapping[str, str], name: str, valid: tuple[str, ...]) -> str:
    text = _read(environ, name, " or ".join(valid))
    if text not in valid:
        raise ValueError(f"{name}={text} must be {' or '.join(valid)}")
    return text
