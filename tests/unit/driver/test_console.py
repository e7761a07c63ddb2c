"""What a person is told, once each."""

from __future__ import annotations

from torchspec.driver.console import new_messages


def test_messages_of_a_sliding_window():
    assert new_messages([], ("a", "b")) == ["a", "b"]
    assert new_messages(["a", "b"], ("b", "c")) == ["c"]
    assert new_messages(["a", "b"], ("c",)) == ["c"]
