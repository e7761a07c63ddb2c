"""The ledger under every kind of disorder: batches depend on the seed alone, nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calls import calls
from torchspec.contracts import SampleId, SampleRef
from torchspec.controller.ledger import Ledger
from torchspec.controller.ledger_snapshot import LedgerShape
from torchspec.data.order import epoch_order


def shape(prompts: int = 10, epochs: int = 2, batch_size: int = 4, seed: int = 7) -> LedgerShape:
    return LedgerShape("data", prompts, epochs, batch_size, seed)


def ledger(window: int = 8, max_failures: int = 3, max_steps: int | None = None, **kwargs: int) -> Ledger:
    return Ledger(shape(**kwargs), window, max_failures, max_steps)


def ref(record) -> SampleRef:
    return SampleRef(record.sample, record.key, 5, b"\xf8", {}, 100, "post_norm")


def lease_all(book: Ledger, worker: str = "w0") -> list:
    leased = []
    while (record := book.next_to_lease()) is not None:
        leased.append(book.lease(record, worker, "run"))
    return leased


def nonzero(book: Ledger) -> dict[str, int]:
    return {state: count for state, count in book.counts().items() if count}


def counted(book: Ledger) -> Counter[str]:
    """The same, counted one by one."""
    states = Counter(record.state for record in book.records.values())
    states["rejected"] = len(book.rejected)
    states["committed"] = sum(p not in book.rejected for p in range(book.committed_cursor))
    states["pending"] += book.end - states.total()
    return +states


def counted_ready(book: Ledger) -> int:
    """Stored samples at the front, counted one by one."""
    ready, cursor = 0, book.steps[max(book.steps)].end if book.steps else book.trained_cursor
    while cursor in book.rejected or (cursor in book.records and book.records[cursor].state == "stored"):
        ready += cursor not in book.rejected
        cursor += 1
    return ready


def seeded_line(s: LedgerShape) -> list[SampleId]:
    return [SampleId(e, int(p)) for e in range(s.epochs) for p in epoch_order(s.seed, e, s.prompts)]


def test_leases_follow_the_seeded_order_and_stop_at_the_window():
    book = ledger(window=6)
    leased = lease_all(book)
    assert [r.sample for r in leased] == seeded_line(book.shape)[:6]


def test_rejected_samples_take_no_room_in_the_window():
    """Else a window full of them would never be trained past."""
    book = ledger(window=6, prompts=30)
    bad = lease_all(book)[:5]
    for record in bad:
        book.fail(record, "bad", final=True)
    assert len(lease_all(book)) == 5
    for record in book.records.values():
        book.store(record, ref(record))
    book.train(book.assign())
    assert book.trained_cursor == 9 and len(lease_all(book)) == 4


def test_a_step_waits_for_the_front_of_the_line():
    book = ledger()
    records = lease_all(book)
    for record in records[1:]:
        book.store(record, ref(record))
    assert book.assign() is None
    assert book.ready() == 0
    book.store(records[0], ref(records[0]))
    assert book.ready() == 8
    assert book.assign() == 1
    assert [r.sample for r in book.step_records(1)] == seeded_line(book.shape)[:4]


def test_the_tail_is_trained_and_batches_roll_over_the_epoch():
    book = ledger(window=100, prompts=5, epochs=3)
    for record in lease_all(book):
        book.store(record, ref(record))
    sizes = []
    while (step := book.assign()) is not None:
        sizes.append(len(book.step_records(step)))
        assert book.is_last(step) == (step == 4)
        book.train(step)
    assert sizes == [4, 4, 4, 3] and book.exhausted


def test_a_failed_lease_is_retried_first_then_rejected_by_name():
    book = ledger(max_failures=2)
    first, *_ = lease_all(book)
    book.fail(first, "boom")
    again = book.next_to_lease()
    assert again is first
    old_key = first.key
    book.lease(again, "w1", "run")
    assert first.key != old_key
    assert book.leased(first.sample, old_key) is None, "late news"
    book.fail(first, "boom")
    assert [r.sample for r in book.rejected.values()] == [first.sample]
    assert "boom" in next(iter(book.rejected.values())).reason


def test_a_late_put_of_an_earlier_attempt_is_not_accepted():
    book = ledger()
    record, *_ = lease_all(book)
    stale = ref(record)
    book.worker_lost("w0", alone=False)
    book.lease(book.next_to_lease(), "w1", "run")
    assert book.leased(stale.sample, stale.key) is None
    assert book.leased(record.sample, record.key) is record
    with pytest.raises(AssertionError):
        book.store(record, stale)
    book.store(record, ref(record))
    assert book.leased(record.sample, record.key) is None and book.is_stored(record.sample, record.key)


def test_a_lost_object_returns_and_keeps_its_step():
    book = ledger()
    for record in lease_all(book):
        book.store(record, ref(record))
    step = book.assign()
    victim = book.step_records(step)[2]
    book.put_back(victim)
    assert book.next_to_lease() is victim
    book.lease(victim, "w1", "run")
    book.store(victim, ref(victim))
    assert victim.state == "assigned" and victim in book.step_records(step)


def test_a_full_store_blames_nobody_and_the_front_of_the_line_gets_through():
    book = ledger(max_failures=1)
    first, *others = lease_all(book)
    for record in others:
        book.store(record, ref(record))
    last = others[-1]
    assert book.defer(first) == last.key
    assert book.next_to_lease() is first
    book.lease(first, "w0", "run")
    assert book.next_to_lease() is None  # the displaced one waits for room
    book.store(first, ref(first))
    assert book.assign() == 1
    book.train(1)
    book.unpark()
    assert book.next_to_lease() is last
    assert not book.rejected


def test_a_store_that_others_have_filled_is_nobodys_fault():
    book = ledger(max_failures=1)
    for _ in range(3):
        first = book.lease(book.next_to_lease(), "w0", "run")
        assert book.defer(first) is None
        assert book.next_to_lease() is None and not book.rejected
        book.unpark()


def test_max_steps_bounds_what_is_leased_and_assigned():
    book = ledger(window=100, max_steps=2)
    for record in lease_all(book):
        book.store(record, ref(record))
    assert [book.assign(), book.assign(), book.assign()] == [1, 2, None]
    assert book.exhausted and book.is_last(2)


def test_resume_refuses_other_data():
    book = ledger()
    with pytest.raises(ValueError, match=r"run\.seed"):
        ledger(seed=8).rewind(book.snapshot(0))
    with pytest.raises(ValueError, match=r"training\.batch_size"):
        ledger(batch_size=2).rewind(book.snapshot(0))


ACTIONS = [*("lease",) * 2, *("store",) * 3, "fail", "full", "die", "lose", *("step",) * 2, "save", "crash", "rewind"]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    prompts=st.integers(1, 12),
    epochs=st.integers(1, 3),
    batch=st.integers(1, 5),
    extra=st.integers(0, 9),
    reject=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_nothing_is_lost_and_nothing_comes_twice(
    seed: int, prompts: int, epochs: int, batch: int, extra: int, reject: float
):
    """Random completion order, failures, dead workers, lost objects, restarts from checkpoints and rewinds in place: to
    where the last commit was, to a checkpoint that nobody has told of, and, in vain, to one before the last commit."""
    chance = random.Random(seed)
    told: dict[SampleId, str] = {}

    def moved(sample: SampleId, before: str, state: str, why: str) -> None:
        assert told.get(sample, "pending") == before != state
        told[sample] = state

    book = Ledger(shape(prompts, epochs, batch, seed % 1000), batch + extra, max_failures=10_000, moved=moved)
    trained: dict[int, list[SampleId]] = {}
    saves = {0: book.snapshot(0)}
    for _ in range(100_000):
        if book.exhausted and book.trained_step == max(book.steps, default=book.trained_step):
            break
        assert nonzero(book) == counted(book)
        assert book.ready() == counted_ready(book)
        assert book.stored_bytes == 100 * sum(book.counts()[state] for state in ("stored", "assigned"))
        assert all(told[record.sample] == record.state for record in book.records.values())
        leased = [r for r in book.records.values() if r.state == "leased"]
        action = chance.choice(ACTIONS)
        if action == "lease" and (record := book.next_to_lease()):
            book.lease(record, chance.choice(["w0", "w1"]), "run")
        elif action == "store" and leased:
            record = chance.choice(leased)
            book.store(record, ref(record))
        elif action == "fail" and leased and chance.random() < 0.3:
            victim = chance.choice(leased)
            book.fail(victim, "boom", final=chance.random() < reject)
        elif action == "die" and chance.random() < 0.1:
            book.worker_lost("w0", alone=False)
        elif action == "full" and leased:
            victim = chance.choice(leased)
            book.defer(victim)
        elif action == "lose" and chance.random() < 0.1:
            stored = [r for r in book.records.values() if r.state in ("stored", "assigned")]
            if stored:
                victim = chance.choice(stored)
                book.put_back(victim)
        elif action == "step":
            book.assign()
            step = book.trained_step + 1
            if step in book.steps and all(r.state == "assigned" for r in book.step_records(step)):
                trained[step] = [r.sample for r in book.step_records(step)]
                book.train(step)
                book.unpark()
        elif action == "save":
            saves[book.trained_step] = book.snapshot(book.trained_step)
            if chance.random() < 0.7:
                book.commit(book.trained_step)
        elif action == "rewind" and chance.random() < 0.1:
            step = chance.choice(list(saves))
            before = dict(told), book.counts(), book.trained_step
            if step < book.committed_step:
                with pytest.raises(ValueError, match=f"step {step} cannot follow that of step {book.committed_step}"):
                    book.rewind(saves[step])
                assert before == (told, book.counts(), book.trained_step)
            else:
                book.rewind(saves[step], keep=lambda _: chance.random() < 0.8)
                saves = {s: save for s, save in saves.items() if s <= step}
                trained = {s: b for s, b in trained.items() if s <= step}
                assert book.trained_step == book.committed_step == step
        elif action == "crash" and chance.random() < 0.05:
            told.clear()
            book = Ledger(book.shape, book.reorder_window, 10_000, moved=moved)
            book.rewind(saves[max(saves)])
            trained = {s: b for s, b in trained.items() if s <= book.committed_step}
    rejected = {rejection.sample for rejection in book.rejected.values()}
    line = [sample for sample in seeded_line(book.shape) if sample not in rejected]
    assert [sample for step in sorted(trained) for sample in trained[step]] == line
    assert rejected or all(len(trained[s]) == batch for s in sorted(trained)[:-1])


def trained_up_to(book: Ledger, step: int) -> None:
    """Lease, store, assign and train every step up to ``step``."""
    while book.trained_step < step:
        for record in lease_all(book):
            book.store(record, ref(record))
        book.train(book.assign())


def test_a_rewind_brings_back_what_was_trained_since_and_keeps_what_is_stored():
    book = ledger(window=10)
    trained_up_to(book, 1)
    saved = book.snapshot(1)
    book.commit(1)
    trained_up_to(book, 2)
    for record in lease_all(book)[:3]:  # the fourth stays with its worker
        book.store(record, ref(record))
    assigned = book.assign()
    batch = [r.sample for r in book.step_records(assigned)]
    useless = book.rewind(saved)
    line = seeded_line(book.shape)
    assert useless == []
    assert (book.trained_step, book.committed_step, book.committed_cursor, book.steps) == (1, 1, 4, {})
    assert nonzero(book) == {"committed": 4, "pending": 6, "stored": 9, "leased": 1}
    again = book.next_to_lease()
    assert again.sample == line[4] and again.attempts == 1
    old_keys = {r.key for r in book.records.values()}
    for record in lease_all(book):
        assert record.key not in old_keys
        book.store(record, ref(record))
    assert [r.sample for r in book.step_records(book.assign())] == line[4:8]
    assert [r.sample for r in book.step_records(book.assign())] == batch == line[8:12]


def test_a_rewind_goes_ahead_to_a_checkpoint_that_nobody_told_of():
    book, ahead = ledger(), ledger()
    trained_up_to(ahead, 2)
    later, *_ = lease_all(ahead)
    ahead.fail(later, "boom", final=True)
    first, second = lease_all(book)[:2]
    book.store(first, ref(first))
    useless = book.rewind(ahead.snapshot(2))
    assert {r.sample for r in useless} == {r.sample for r in (first, second)} | set(seeded_line(book.shape)[2:8])
    assert (book.committed_cursor, book.trained_step) == (8, 2)
    assert book.leased(second.sample, second.key) is None
    assert book.next_to_lease().sample == seeded_line(book.shape)[8]


def test_a_rewind_drops_what_is_stored_in_another_way():
    book = ledger(window=8)
    kept, dropped, *_ = lease_all(book)
    for record in (kept, dropped):
        book.store(record, ref(record))
    assert book.rewind(None, keep=lambda ref: ref.key == kept.key) == [dropped]
    assert (kept.state, dropped.state, book.next_to_lease()) == ("stored", "pending", dropped)


def test_what_was_rejected_stays_rejected_over_a_rewind():
    book = ledger(max_failures=1)
    saved = book.snapshot(0)
    first, *others = lease_all(book)
    book.fail(first, "boom")
    for record in others:
        book.store(record, ref(record))
    book.train(book.assign())
    book.rewind(saved)
    assert [r.sample for r in book.rejected.values()] == [first.sample]
    for record in lease_all(book):
        book.store(record, ref(record))
    assert [r.sample for r in book.step_records(book.assign())] == seeded_line(book.shape)[1:5]


def test_a_sample_is_rejected_for_a_death_that_it_was_alone_in():
    """Its neighbours die with it twice, and are not rejected however often that happens."""
    book = ledger(max_failures=3)
    poison, *others = lease_all(book, "w1")
    for worker in ("w1", "w2"):
        assert not any(book.is_suspect(r) for r in book.records.values())
        book.worker_lost(worker, alone=False)
        if worker == "w1":
            lease_all(book, "w2")
    assert all(book.is_suspect(r) for r in [poison, *others]) and not book.rejected
    assert book.next_to_lease() is poison
    book.lease(poison, "w3", "run")
    book.worker_lost("w3", alone=True)
    assert [r.sample for r in book.rejected.values()] == [poison.sample]
    assert "w3" in next(iter(book.rejected.values())).reason
    for record in others:
        book.lease(record, "w4", "run")
        book.store(record, ref(record))
        assert not book.is_suspect(record)


def test_while_stopping_only_what_a_formed_step_waits_for_is_leased():
    book = ledger(window=8)
    for record in lease_all(book)[:7]:
        book.store(record, ref(record))
    behind = book.records[5]
    book.put_back(behind)
    assert book.next_to_lease(of_steps_only=True) is None
    book.assign()
    missing = book.records[2]
    book.put_back(missing)
    assert book.next_to_lease(of_steps_only=True) is missing
    book.lease(missing, "w1", "run")
    book.store(missing, ref(missing))
    assert missing.state == "assigned"
    assert book.next_to_lease() is behind


def test_a_lease_given_back_is_held_against_nobody():
    book = ledger(max_failures=1)
    record, *_ = lease_all(book)
    for _ in range(3):
        book.put_back(record)
        assert book.leased(record.sample, record.key) is None
        book.lease(book.next_to_lease(), "w1", "run")
    assert not book.rejected and book.leased_to("w1") == [record]


class Seen(int):
    """An int whose comparisons are calls, so that a profiler sees those, too, that lists and heaps make of it in C."""

    __hash__ = int.__hash__

    def __lt__(self, other: int) -> bool:
        return int.__lt__(self, other)

    def __eq__(self, other: object) -> bool:
        return int.__eq__(self, other)

    def __add__(self, other: int) -> Seen:
        return Seen(int.__add__(self, other))


def test_no_call_looks_at_all_that_is_not_committed():
    """A million positions, 200 steps of 256 since the last checkpoint, and a rewind of all of them."""
    book = ledger(window=256, prompts=1_000_000, epochs=1, batch_size=256)
    book._frontier = Seen(0)
    trained_up_to(book, 200)
    book.reorder_window = 1024
    later = lease_all(book)
    for record in reversed(later[1:]):  # all but the front
        book.store(record, ref(record))
    uncommitted = len(book.records)
    assert uncommitted == 52_224
    assert calls(lambda: [book.counts(), book.ready(), book.stored_bytes, book.exhausted, book.assign()]) < 100
    assert calls(lambda: book.store(later[0], ref(later[0]))) < 10 * len(later), "the whole window is ready, once"
    assert book.ready() == len(later)
    book.put_back(later[-1])
    book.lease(book.next_to_lease(), "w0", "run")
    assert calls(lambda: [book.store(later[-1], ref(later[-1])), book.ready()]) < 100
    assert calls(lambda: book.furthest_behind(0, [record.sample for record in later])) < 10 * len(later)
    assert calls(lambda: book.rewind(None)) < 100 * uncommitted
    most = 0
    for _ in range(uncommitted - len(later)):
        most = max(most, calls(lambda: book.lease(book.next_to_lease(), "w1", "run")))
    assert most < 300 and book.next_to_lease() is None
    assert [record.position for record in book.leased_to("w1")[:2]] == [0, 1]
