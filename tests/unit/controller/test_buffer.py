"""The buffer: which state a sample goes to, and that its credits come back once its object has left the store."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import pytest

from tests.integration.controller_harness import make_spec
from torchspec.contracts import Answer, Lease, SampleRef
from torchspec.controller import objects
from torchspec.controller.buffer import SampleBuffer
from torchspec.controller.steps import TrainingGroup
from torchspec.files import read_lines
from torchspec.monitor.record.observer import Observer
from torchspec.run_folder import RunFolder
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreUnavailable
from torchspec.training.checkpoint import point

ENDPOINT = StoreEndpoint("unused", metrics="")


class Store:
    """Removes nothing while it is ``away``."""

    away = False
    removed: set[str]

    def __init__(self, endpoint: StoreEndpoint):
        Store.away, Store.removed = False, set()

    def remove(self, key: str, suffixes: Iterable[str]) -> None:
        if self.away:
            raise StoreUnavailable("away")
        self.removed.add(key)

    def remove_all(self, prefix: str) -> None:
        pass

    def close(self) -> None:
        pass


class Scene:
    """A buffer, and what a worker does to it."""

    def __init__(self, run_dir: Path):
        self.spec = make_spec(ENDPOINT, run_dir, training={"epochs": 1}, controller={"reorder_window": 10})
        self.changes = 0
        self.observer = Observer(run_dir, 0)
        self.buffer = SampleBuffer(self.spec, self.observer, self.change)
        self.ledger, self.credits = self.buffer.ledger, self.buffer.credits

    def change(self) -> None:
        self.changes += 1

    def lease(self, worker: str = "w") -> Lease:
        lease = self.buffer.lease(self.ledger, self.ledger.next_to_lease(), worker)
        assert lease is not None and self.state(lease) == "leased"
        assert self.credits.held[lease.sample] == lease.credit_bytes > 0
        return lease

    async def publish(self, lease: Lease) -> SampleRef:
        ref = SampleRef(lease.sample, lease.key, 6, b"\xfc", {}, 100, "post_norm")
        await self.buffer.publish(ref, Answer(lease.sample.prompt, (7, 8, 9, 0), "text", "stop"), None)
        return ref

    async def stored(self, count: int = 4) -> list[SampleRef]:
        return [await self.publish(self.lease()) for _ in range(count)]

    def state(self, lease: Lease | SampleRef) -> str:
        return {r.sample: r.state for r in self.ledger.records.values()}[lease.sample]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    """Runs a scene against a store that is a stand-in."""
    monkeypatch.setattr(objects, "StoreClient", Store)
    monkeypatch.setattr(objects, "_ATTEMPTS", 1)
    monkeypatch.setattr(objects, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(objects, "_LONG_PAUSE_SECONDS", 0.01)

    def run(script: Callable[[Scene], Awaitable[None]]) -> None:
        async def whole() -> None:
            scene = Scene(tmp_path)
            await scene.buffer.open(scene.spec.config)
            await script(scene)
            await scene.buffer.close()

        asyncio.run(whole())

    return run


def test_a_lease_reserves_the_upper_bound_and_a_stored_sample_its_true_size(play) -> None:
    async def script(scene: Scene) -> None:
        lease, changes = scene.lease(), scene.changes
        ref = await scene.publish(lease)
        assert scene.state(lease) == "stored" and scene.changes > changes
        assert 0 < scene.credits.held[lease.sample] == scene.buffer.geometry.stored_bytes(6) <= lease.credit_bytes
        changes = scene.changes
        await scene.buffer.publish(ref, None, None)
        assert scene.changes == changes and scene.state(lease) == "stored", "said twice"

    play(script)


def test_credits_of_a_trained_step_come_back_once_its_objects_are_gone(play) -> None:
    async def script(scene: Scene) -> None:
        refs = await scene.stored()
        used = scene.credits.used
        Store.away = True
        scene.buffer.train(scene.ledger.assign())
        assert {scene.state(ref) for ref in refs} == {"trained"}
        await asyncio.sleep(0.05)
        assert scene.credits.used == used > 0, "they are still in the store"
        Store.away = False
        await scene.until(lambda: not scene.credits.used)
        assert Store.removed == {ref.key for ref in refs}
        assert [line["event"] for line in read_lines(RunFolder(scene.spec.run_dir).journal)] == ["started", "trained"]

    play(script)


def test_a_failure_keeps_the_credits_and_a_rejection_gives_them_back_and_is_written_down(play) -> None:
    async def script(scene: Scene) -> None:
        lease = scene.lease()
        await scene.buffer.fail("w", lease.sample, lease.key, "unlucky", "retry")
        assert scene.state(lease) == "pending" and lease.sample in scene.credits.held
        again = scene.lease()
        assert again.sample == lease.sample and again.key != lease.key
        await scene.buffer.fail("w", lease.sample, lease.key, "late news", "final")
        assert scene.state(again) == "leased"
        await scene.buffer.fail("w", again.sample, again.key, "too long", "final")
        assert scene.ledger.counts()["rejected"] == 1 and not scene.credits.used
        await scene.observer.files.written()
        folder = RunFolder(scene.spec.run_dir)
        (rejected,) = read_lines(folder.rejected)
        assert rejected["reason"] == "too long (attempt 2)"
        assert {"event": "rejected", **rejected} in list(read_lines(folder.journal))

    play(script)


def test_a_lost_sample_keeps_its_step_and_its_credits(play) -> None:
    async def script(scene: Scene) -> None:
        refs = await scene.stored()
        step = scene.ledger.assign()
        scene.buffer.lose(scene.ledger, step, {refs[2].sample})
        assert [scene.state(ref) for ref in refs] == ["assigned", "assigned", "pending", "assigned"]
        assert refs[2].sample in scene.credits.held
        assert (await scene.publish(scene.lease())).sample == refs[2].sample
        assert {scene.state(ref) for ref in refs} == {"assigned"}

    play(script)


def test_the_leases_of_a_dead_worker_go_back_and_what_it_has_stored_is_removed(play) -> None:
    async def script(scene: Scene) -> None:
        leases = [scene.lease("w0"), scene.lease("w0"), scene.lease("w1")]
        assert scene.buffer.worker_lost("w0", True) == 2
        assert [scene.state(lease) for lease in leases] == ["pending", "pending", "leased"]
        await scene.until(lambda: Store.removed == {lease.key for lease in leases[:2]})

    play(script)


def test_a_worker_that_somebody_else_has_ended_says_nothing_about_its_samples(play) -> None:
    """However often: a healthy prompt was rejected because its workers were killed at random."""

    async def script(scene: Scene) -> None:
        for number in range(5):
            lease = scene.lease(f"w{number}")
            assert scene.buffer.worker_lost(f"w{number}", False) == 1
            assert scene.state(lease) == "pending"
        assert not scene.ledger.rejected and not any(r.deaths for r in scene.ledger.records.values())

    play(script)


def test_what_a_rewind_makes_pending_holds_no_credits_and_what_is_stored_does(play) -> None:
    async def script(scene: Scene) -> None:
        trained, stored = await scene.stored(), await scene.stored(3)
        scene.buffer.train(scene.ledger.assign())
        scene.buffer.rewind()
        await scene.until(lambda: set(scene.credits.held) == {ref.sample for ref in stored})
        assert {scene.state(ref) for ref in trained} == {"pending"}
        assert {scene.state(ref) for ref in stored} == {"stored"}
        assert scene.ledger.counts()["trained"] == 0

    play(script)


def saved(scene: Scene, step: int) -> Path:
    """A checkpoint of ``step``, told of or not."""
    folder = RunFolder(scene.spec.run_dir).checkpoint(step)
    folder.mkdir(parents=True)
    (folder / "ledger.json").write_text(scene.ledger.snapshot(step))
    return folder


def test_a_rewind_goes_to_the_checkpoint_that_is_committed_whatever_latest_says(play) -> None:
    """Public bug reports' other side: another machine may see an older link for a minute."""

    async def script(scene: Scene) -> None:
        refs = await scene.stored(8)
        for step in (1, 2):
            scene.buffer.train(scene.ledger.assign())
            scene.buffer.commit(step, str(saved(scene, step)))
            if step == 1:
                point(RunFolder(scene.spec.run_dir).checkpoints, "latest", scene.buffer._folder.checkpoint(1))
        await scene.stored(1)
        scene.buffer.rewind()
        assert scene.buffer.checkpoint == RunFolder(scene.spec.run_dir).checkpoint(2)
        assert (scene.ledger.trained_step, scene.ledger.counts()["committed"]) == (2, len(refs))

    play(script)


def test_a_checkpoint_that_somebody_has_deleted_ends_the_run_in_one_line(play) -> None:
    """It went back to a step whose samples it had forgotten, and waited for them for ever."""

    async def script(scene: Scene) -> None:
        await scene.stored(6)
        scene.buffer.train(scene.ledger.assign())
        scene.buffer.commit(1, str(saved(scene, 1)))
        shutil.rmtree(RunFolder(scene.spec.run_dir).checkpoints)
        with pytest.raises(ValueError, match=r"step_000001 is gone or not complete, and ledger\.jsonl says that step"):
            scene.buffer.rewind()
        again = SampleBuffer(scene.spec, Observer(scene.spec.run_dir, 0), scene.change)
        with pytest.raises(ValueError, match=r"step_000001 is gone"):
            await again.open(scene.spec.config)

    play(script)


def test_a_run_goes_back_to_an_older_checkpoint_where_that_is_asked_for(play) -> None:
    async def script(scene: Scene) -> None:
        await scene.stored(8)
        for step in (1, 2):
            scene.buffer.train(scene.ledger.assign())
            scene.buffer.commit(step, str(saved(scene, step)))
        older = scene.buffer._folder.checkpoint(1)
        for go_back_to in (older, None):
            point(older.parent, "latest", older)
            again = SampleBuffer(scene.spec, Observer(scene.spec.run_dir, 0), scene.change)
            await again.open(scene.spec.config, go_back_to)
            assert again.checkpoint == older and again.ledger.committed_step == 1, "also by a controller after it"
            await again.close()

    play(script)


def test_damaged_lines_end_no_resume_and_are_told_of(play) -> None:
    async def script(scene: Scene) -> None:
        refs, folder = await scene.stored(3), RunFolder(scene.spec.run_dir)
        await scene.observer.files.written()
        for path, line in ((folder.journal, 0), (folder.answers, 1)):
            lines = path.read_bytes().splitlines(keepends=True)
            lines.insert(line, b"\0" * len(lines[0]) + b"\n")
            path.write_bytes(b"".join(lines))
        again = SampleBuffer(scene.spec, observer := Observer(scene.spec.run_dir, 0), scene.change)
        await again.open(scene.spec.config)
        assert all(again.prompts.answer(ref.sample) is not None for ref in refs)
        assert [message for message in observer.messages if "damaged" in message] == [
            f"{folder.answers}: damaged and passed over: line 2",
            f"{folder.journal}: damaged and passed over: line 1",
        ]
        assert again._key_prefix != scene.buffer._key_prefix
        await again.close()

    play(script)


def test_what_is_forgotten_is_captured_again_but_not_what_a_formed_step_needs(play) -> None:
    async def script(scene: Scene) -> None:
        refs = await scene.stored(6)
        scene.ledger.assign()
        scene.buffer.forget(lambda ref: ref.key == refs[5].key)
        assert [scene.state(ref) for ref in refs] == ["assigned"] * 4 + ["pending", "stored"]
        await scene.until(lambda: refs[4].sample not in scene.credits.held)
        assert Store.removed == {refs[4].key}

    play(script)


def test_the_front_gets_its_credits_from_whoever_is_furthest_behind(play) -> None:
    """After a rewind the samples that were trained have none, and those behind have them all."""

    async def script(scene: Scene) -> None:
        refs = await scene.stored(6)
        scene.buffer.train(scene.ledger.assign())
        scene.buffer.rewind()
        await scene.until(lambda: set(scene.credits.held) == {ref.sample for ref in refs[4:]})
        scene.credits.capacity = scene.credits.used
        front = scene.ledger.next_to_lease()
        assert front.sample == refs[0].sample and scene.buffer.lease(scene.ledger, front, "w") is None
        scene.buffer.make_room(scene.ledger, front)
        assert [scene.state(ref) for ref in refs[4:]] == ["stored", "pending"]
        await scene.until(lambda: refs[5].sample not in scene.credits.held)

    play(script)


def test_while_answers_are_counted_those_that_are_there_make_room_and_are_made_again_in_order(play) -> None:
    """A store of three, six to count: the front stays, and what gave up its place waits until all are counted."""

    async def script(scene: Scene) -> None:
        buffer, ledger, order = scene.buffer, scene.ledger, [scene.ledger.sample_at(p) for p in range(10)]
        buffer.counted_first = 6
        refs = await scene.stored(3)
        scene.credits.capacity = scene.credits.used
        for position in range(3, 6):
            record = ledger.next_to_lease()
            assert record.sample == order[position] and buffer.lease(ledger, record, "w") is None
            assert buffer.displaces(ledger, record)
            buffer.make_room(ledger, record)
            await scene.until(lambda record=record: buffer.credits.fits(record.sample, refs[0].num_bytes))
            refs.append(await scene.publish(scene.lease()))
        assert [scene.state(ref) for ref in refs] == ["stored"] * 2 + ["pending"] * 3 + ["stored"]
        last = ledger.next_to_lease()
        assert last.sample == order[6] and not buffer.displaces(ledger, last), "what is not counted waits"
        buffer.all_counted()
        assert ledger.next_to_lease().sample == order[2]
        buffer.make_room(ledger, ledger.next_to_lease())
        assert [scene.state(ref) for ref in refs] == ["stored"] * 2 + ["pending"] * 4

    play(script)


def test_no_step_is_formed_while_answers_are_counted(play) -> None:
    """It could not be trained yet, and would keep the room that the answers to come need."""

    async def script(scene: Scene) -> None:
        scene.buffer.counted_first = 6
        group = TrainingGroup(scene.buffer, scene.spec.config, closing=False)
        refs = await scene.stored(4)
        group.advance()
        assert not scene.ledger.steps
        scene.credits.capacity = scene.credits.used
        scene.buffer.make_room(scene.ledger, scene.ledger.next_to_lease())
        assert [scene.state(ref) for ref in refs] == ["stored"] * 3 + ["pending"]
        await scene.until(lambda: refs[3].sample not in scene.credits.held)
        scene.buffer.all_counted()
        await scene.stored(1)
        group.advance()
        assert [r.sample for r in scene.ledger.step_records(1)] == [ref.sample for ref in refs]

    play(script)
