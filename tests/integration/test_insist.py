"""A call that an actor has carried out before its process died is made again, with and without an event loop."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import ray

from tests.integration.trainer_harness import running_ray
from torchspec.insist import insist, insist_and_wait


class Forgetful:
    """Notes each call, and dies of the first two before they are answered."""

    def __init__(self, notes: Path):
        self._notes = notes

    async def say(self, word: str) -> str:
        with self._notes.open("a") as file:
            file.write(f"{word}\n")
        if len(self._notes.read_text().split()) <= 2:
            os._exit(1)
        return word.upper()


def test_answers_that_are_lost_are_asked_for_again(tmp_path: Path) -> None:
    with running_ray():
        actor = ray.remote(Forgetful).options(num_cpus=0, max_restarts=-1).remote(tmp_path / "notes")
        assert insist_and_wait(actor.say, "hello") == "HELLO"
        assert (tmp_path / "notes").read_text().split() == ["hello"] * 3
        assert asyncio.run(insist(actor.say, "again")) == "AGAIN"
