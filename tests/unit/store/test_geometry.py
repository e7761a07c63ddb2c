"""What samples look like in the store, and how a process says where the store is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.contracts import TensorSpec
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import MissingObject, StoreError, StoreFull, StoreUnavailable, error_for
from torchspec.store.geometry import SampleGeometry, object_bytes, stored_bytes


def test_shapes_of_a_sample() -> None:
    assert SampleGeometry(3, 576, "bfloat16").tensors(10) == {
        "hs": TensorSpec((10, 1728), "bfloat16"),
        "lhs": TensorSpec((10, 576), "bfloat16"),
        "ids": TensorSpec((10,), "int32"),
    }


def test_bytes_of_a_sample() -> None:
    tensors = SampleGeometry(3, 576, "bfloat16").tensors(200)
    assert [spec.num_bytes for spec in tensors.values()] == [691_200, 230_400, 800]
    assert stored_bytes(tensors) == 11 * 65536 + 15 * 16384 + 4096


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'float8_e4m3fn'.*bfloat16"):
        _ = TensorSpec((4,), "float8_e4m3fn").num_bytes


@settings(deadline=None)
@given(st.integers(1, 1 << 42))
def test_rounding_is_an_upper_bound_within_an_eighth(size: int) -> None:
    rounded = object_bytes(size)
    assert size <= rounded <= max(4096, size + size // 8)
    assert object_bytes(rounded) == rounded


def test_endpoint_goes_through_json() -> None:
    endpoint = StoreEndpoint("10.0.0.1:5", "10.0.0.1:6", protocol="rdma", local_hostname="10.0.0.1")
    assert StoreEndpoint.from_json(endpoint.to_json()) == endpoint


def test_codes_become_our_errors() -> None:
    assert type(error_for(-200, "put", "k_hs")) is StoreFull
    assert type(error_for(-704, "get", "k_hs")) is MissingObject
    assert type(error_for(-900, "get", "k_hs")) is StoreUnavailable
    assert type(error_for(-1, "get", "k_hs")) is StoreError
    assert str(error_for(-200, "put", "k_hs")).startswith("put of k_hs: ")


def test_counting_bytes_needs_neither_torch_nor_mooncake() -> None:
    code = (
        "import sys, torchspec.store.geometry, torchspec.store.endpoint, torchspec.store.errors\n"
        "assert not {'torch', 'mooncake', 'ray'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
