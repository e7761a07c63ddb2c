"""Masks are packed as numpy packs bits, and come back."""

from __future__ import annotations

import pytest

from torchspec.data.masks import pack_mask, unpack_mask


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64, 65])
def test_a_mask_comes_back_and_takes_a_bit_a_token(length: int) -> None:
    mask = [i % 3 == 0 or i % 7 == 5 for i in range(length)]
    assert unpack_mask(pack_mask(mask), length) == mask == unpack_mask(pack_mask([int(m) for m in mask]), length)
    assert len(pack_mask(mask)) == -(-length // 8)


def test_the_first_token_is_the_highest_bit() -> None:
    assert pack_mask([1, 0, 0, 0, 0, 0, 1, 1, 1]) == bytes([0b10000011, 0b10000000])


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes cannot describe 17 tokens"):
        unpack_mask(b"ab", 17)
