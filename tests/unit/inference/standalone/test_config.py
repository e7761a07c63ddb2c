"""What a stand-alone server accepts from its user, and what it answers, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from torchspec.contracts import TensorSpec
from torchspec.inference.capture.protocol import Captured, decode_captured, encode_captured, encode_failed
from torchspec.inference.standalone.config import StandaloneConfig, reply_entry, request_metadata
from torchspec.shards import ShardFormula

ENVIRONMENT = {
    "TORCHSPEC_USP_SHARDED_MOONCAKE": "1",
    "TORCHSPEC_USP_SP_SIZE": "8",
    "TORCHSPEC_USP_RING_SIZE": "2",
    "TORCHSPEC_USP_LAYOUT": "zigzag",
    "TORCHSPEC_USP_TTT_LENGTH": "7",
    "TORCHSPEC_USP_MAX_SEQ_LENGTH": "100",
    "MOONCAKE_MASTER": "store.example:50051",
}
SHARDING = ShardFormula(ulysses_size=4, ring_size=2, layout="zigzag", halo=7)
TENSORS = {"hs": TensorSpec((9, 12), "bfloat16"), "ids": TensorSpec((9,), "int32")}


def config(**changes: str) -> StandaloneConfig:
    return StandaloneConfig.from_environment(ENVIRONMENT | changes)


def test_the_environment_says_where_and_how_to_store() -> None:
    plain = config()
    assert (plain.sharding, plain.max_length, plain.buffer_bytes) == (SHARDING, 100, 1 << 30)
    endpoint = plain.endpoint
    assert (endpoint.master, endpoint.protocol, endpoint.local_hostname) == ("store.example:50051", "tcp", None)
    chosen = config(
        MOONCAKE_PROTOCOL="rdma",
        MOONCAKE_LOCAL_HOSTNAME="10.0.0.7",
        MOONCAKE_TE_META_DATA_SERVER="http://10.0.0.1:8080/metadata",
        MOONCAKE_LOCAL_BUFFER_SIZE="4096",
    )
    assert (chosen.endpoint.protocol, chosen.endpoint.local_hostname) == ("rdma", "10.0.0.7")
    assert (chosen.endpoint.metadata, chosen.buffer_bytes) == ("http://10.0.0.1:8080/metadata", 4096)


@pytest.mark.parametrize("name", sorted(ENVIRONMENT.keys() - {"TORCHSPEC_USP_SHARDED_MOONCAKE"}))
def test_a_missing_variable_is_named_with_its_valid_values(name: str) -> None:
    left = {other: value for other, value in ENVIRONMENT.items() if other != name}
    with pytest.raises(ValueError, match=rf"^{name} is not set; it must be .+") as error:
        StandaloneConfig.from_environment(left)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("TORCHSPEC_USP_SHARDED_MOONCAKE", "yes", "1"),
        ("TORCHSPEC_USP_SP_SIZE", "0", "positive integer"),
        ("TORCHSPEC_USP_RING_SIZE", "3", "divide TORCHSPEC_USP_SP_SIZE=8"),
        ("TORCHSPEC_USP_LAYOUT", "striped", "contiguous or zigzag"),
        ("TORCHSPEC_USP_TTT_LENGTH", "-1", "positive integer"),
        ("TORCHSPEC_USP_MAX_SEQ_LENGTH", "64K", "positive integer"),
        ("MOONCAKE_MASTER", "store.example", "HOST:PORT"),
        ("MOONCAKE_MASTER", "store.example:99999", "HOST:PORT"),
        ("MOONCAKE_PROTOCOL", "udp", "tcp or rdma"),
        ("MOONCAKE_LOCAL_BUFFER_SIZE", "1gb", "positive integer"),
    ],
)
def test_an_invalid_variable_is_named_with_its_valid_values(name: str, value: str, valid: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value} must .*{valid}"):
        config(**{name: value})


def test_requests_are_refused_before_they_are_computed() -> None:
    check = config().check_request
    check("some id", 10_000, {})  # not for us
    check("capture:k:", 91, {"max_new_tokens": 10})
    check("capture:k:", 100, {"max_new_tokens": 1})
    check("capture:k:", 100, {"max_new_tokens": 0})
    for rid, length, sampling, reason in (
        ("capture:k:", 92, {"max_new_tokens": 10}, "101 tokens .* TORCHSPEC_USP_MAX_SEQ_LENGTH=100"),
        ("capture:k:", 101, {"max_new_tokens": 0}, "101 tokens"),
        ("capture:k:", 5, {}, "max_new_tokens"),
        ("capture:k:", 5, {"max_new_tokens": 1, "n": 2}, "n=2 must be 1"),
        ("capture:k", 5, {"max_new_tokens": 1}, "capture:KEY:"),
        ("capture::", 5, {"max_new_tokens": 1}, "capture:KEY:"),
        ("capture:a:b:", 5, {"max_new_tokens": 1}, "capture:KEY:"),
    ):
        with pytest.raises(ValueError, match=reason):
            check(rid, length, sampling)


def sampling_with(metadata: Any) -> dict[str, Any]:
    return {"max_new_tokens": 1, "custom_params": {"metadata": metadata}}


def test_metadata_of_request_and_store_both_survive() -> None:
    captured = Captured(TENSORS, num_bytes=252, put_seconds=0.5, sharding=SHARDING)
    metadata = {"has_thinking": True, "source": "a.jsonl"}
    config().check_request("capture:k:", 5, sampling_with(metadata))
    merged = reply_entry(request_metadata(sampling_with(metadata)), encode_captured("k", captured))
    assert (merged["has_thinking"], merged["source"]) == (True, "a.jsonl")
    assert (merged["stored"], merged["key"], merged["bytes"]) == (True, "k", 252)
    assert (merged["usp_sharded"], merged["layout"], merged["ulysses_size"], merged["ring_size"]) == (
        True,
        "zigzag",
        4,
        2,
    )
    assert merged["tensors"]["hs"] == {"shape": (9, 12), "dtype": "bfloat16"}
    assert decode_captured(merged) == captured
    failed = reply_entry(metadata, encode_failed("k", "it is full", "no_room"))
    told = {"stored": False, "key": "k", "reason": "it is full", "no_room": True, "no_store": False}
    assert failed == metadata | told
    assert reply_entry(request_metadata({"max_new_tokens": 1}), failed) == failed


@pytest.mark.parametrize("field", ["stored", "layout", "tensors", "usp_sharded", "reason", "ttt_length"])
def test_metadata_that_would_hide_what_was_stored_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"must not name {field}:"):
        config().check_request("capture:k:", 5, sampling_with({"mine": 1, field: 1}))


@pytest.mark.parametrize("metadata", [{"nested": {"a": 1}}, {"list": [1]}, ["a"], "text"])
def test_metadata_that_would_not_come_back_as_it_was_is_refused(metadata: Any) -> None:
    with pytest.raises(ValueError, match="object of strings, numbers, booleans and nulls"):
        config().check_request("capture:k:", 5, sampling_with(metadata))


def test_an_unsharded_capture_says_so() -> None:
    captured = Captured(TENSORS, num_bytes=252, put_seconds=0.5)
    message = encode_captured("k", captured)
    assert message["usp_sharded"] is False and "layout" not in message
    assert decode_captured(message) == captured


def test_arguments_of_the_server_are_checked() -> None:
    row_bytes = (2 + 1) * 64 * 4 + 4
    enough = 5 * (101 * row_bytes + 3 * 64)
    check = config(MOONCAKE_LOCAL_BUFFER_SIZE=str(enough)).check_server
    check([1, 5], prefix_cache=False, running=5, hidden=64, dtype="float32")
    for arguments, reason in (
        ((None, False, 5, 64, "float32"), "--return-aux-hidden-state-layer-ids"),
        (([1, 5], True, 5, 64, "float32"), "--disable-radix-cache"),
        (([1, 5], False, None, 64, "float32"), "--max-running-requests"),
        (([1, 5], False, 6, 64, "float32"), r"MOONCAKE_LOCAL_BUFFER_SIZE=\d+ must be at least \d+"),
    ):
        with pytest.raises(ValueError, match=reason):
            check(*arguments)
