"""Everything that can be wrong with what the user asked for, found before anything starts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from torchspec.config.schema import Config
from torchspec.controller.journal import read_journal
from torchspec.controller.ledger_snapshot import LedgerSnapshot, ledger_shape
from torchspec.controller.prompts import Writer, check_reuse
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import PromptSet, TokenizeOptions, count_reasons
from torchspec.data.survey import Survey, survey
from torchspec.driver.plan import Plan, check_gpus, check_memory, make_plan
from torchspec.driver.resolve import Resolved, resolve
from torchspec.driver.sizes import check_sizes
from torchspec.inference.sglang_patch import check_patched
from torchspec.monitor.trackers import check_trackers
from torchspec.run_folder import LEDGER_FILE, RunFolder
from torchspec.target.checkpoint import find_checkpoint
from torchspec.training.checkpoint import read_info
from torchspec.training.weights import check_start

T = TypeVar("T", PromptSet, Survey)


@dataclass(frozen=True)
class Prepared:
    """A checked run: what to train, on what, with which figures."""

    resolved: Resolved
    train: PromptSet
    heldout: PromptSet | None
    plan: Plan
    folder: RunFolder
    mark: str
    """Found in the environment of every process of this run."""
    go_back_to: Path | None = None
    """An older checkpoint, from which a resume is to go on."""

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, for the schedule."""
        return self.config.training.total_steps(len(self.train))


def prepare(config: Config, resume: bool, message: Callable[[str], None], start: str = "latest") -> Prepared:
    """Check target, data, machine and folder. Raises ValueError: one line with what is wrong and how to mend it.

    Args:
        start: the checkpoint that a resume goes on from: ``latest``, ``best`` or a step.
    """
    check_patched()
    check_trackers(config.monitor)
    resolved = resolve(config)
    config = resolved.config
    if config.answer.reuse is not None:
        check_reuse(config.answer.reuse, Writer.of(config.answer, resolved.target.fingerprint))
    folder = RunFolder(config.run_dir)
    folder.expect(resume)
    resume_from = _checkpoint(folder, start) if resume else None
    message("reading and tokenising the prompts")
    read = partial(load_or_build, progress=_told(message))
    start_weights = config.training.init_from if resume_from is None else None
    train, heldout = _check_and_read(resolved, read, lambda data: (len(data), data.fully_answered), start_weights)
    _tell_changes(train, message)
    if resume_from is not None:
        LedgerSnapshot.from_json((resume_from / LEDGER_FILE).read_text(), ledger_shape(config, train))
        _tell_schedule(resume_from, config.training.total_steps(len(train)), config, message)
    plan = make_plan(resolved, len(heldout) if heldout else 0)
    if config.cluster.address is None:
        check_memory(plan)
    folder.make()
    if not resume:
        _list_rejected(folder, train, heldout)
    mark, go_back_to = f"{folder.path}#{secrets.token_hex(8)}", resume_from if start != "latest" else None
    return Prepared(resolved, train, heldout, plan, folder, mark, go_back_to)


def _checkpoint(folder: RunFolder, start: str) -> Path | None:
    """That a resume goes on from. None: the beginning, for there is none yet. Raises ValueError: it is not there."""
    if start != "latest":
        return folder.find_checkpoint(start)
    return folder.last_checkpoint(read_journal(folder.journal).committed_step)


def make_plan_for(config: Config) -> tuple[Plan, Survey]:
    """The figures of a run and of its data, of which a sample is tokenised. Raises ValueError: it could not run."""
    resolved = resolve(config)
    start_weights = resolved.config.training.init_from
    train, heldout = _check_and_read(resolved, survey, lambda data: (data.rows, not data.answer_tokens), start_weights)
    return make_plan(resolved, heldout.rows if heldout else 0), train


def read_prompts(config: Config, knob: str, read: Callable[..., T]) -> T:
    """The conversations of ``data.train`` or ``evaluation.heldout``.

    Args:
        read: ``load_or_build`` or ``survey``, which take the same arguments.
    """
    data, evaluation = config.data, config.evaluation
    source, limit = (data.train, data.limit) if knob == "data.train" else (evaluation.heldout, evaluation.samples)
    options = TokenizeOptions(
        columns=dict(data.columns),
        chat_template=data.chat_template,
        template_kwargs=data.template_kwargs,
        max_seq_length=data.max_seq_length,
        too_long=data.too_long,
        min_loss_tokens=data.min_loss_tokens,
        last_turn_only=data.last_turn_only,
        max_new_tokens=config.answer.max_tokens,
        on_error=data.on_error,
        limit=limit,
        trust_remote_code=config.target.trust_remote_code,
    )
    return read(source, find_checkpoint(config.target.path), options, data.cache_dir, knob)


def _check_and_read(
    resolved: Resolved,
    read: Callable[..., T],
    rows_and_answered: Callable[[T], tuple[int, bool]],
    start_weights: Path | None,
) -> tuple[T, T | None]:
    """The training and the held-out data.

    Args:
        start_weights: a draft that this one is to start from.

    Raises:
        ValueError: a line for each thing, in the data or elsewhere, that cannot work.
    """
    config, wrong = resolved.config, list[str]()

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            wrong.append(str(error))

    heldout = None
    with noted():
        check_sizes(config, resolved.draft.target, resolved.geometry)
    if resolved.on_gpu:
        with noted():
            check_gpus(config, torch.cuda.device_count())
    if start_weights is not None:
        with noted():
            check_start(start_weights, resolved.draft)
    with noted():
        train = read_prompts(config, "data.train", read)
        wrong += _complaints(resolved, *rows_and_answered(train), train.rejected)
    if config.evaluation.heldout is not None:
        with noted():
            heldout = read_prompts(config, "evaluation.heldout", read)
    if wrong:
        raise ValueError("\n".join(dict.fromkeys(wrong)))
    return train, heldout


def _complaints(resolved: Resolved, rows: int, answered: bool, rejected: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What cannot work with so many ``rows`` of training data. ``answered``: no row waits for an answer."""
    config, data = resolved.config, resolved.config.data
    if rows == 0:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3])
        yield f"data.train {data.train}: no usable conversation is left ({reasons or 'it holds none at all'})"
    if answered:
        return
    try:
        resolved.draft.check_answers(config.answer.max_tokens)
    except ValueError as error:
        yield str(error)
    window, counted = config.controller.reorder_window, min(data.vocab_prompts, rows)
    if resolved.draft.vocab_size is not None and window < counted:
        yield (
            f"controller.reorder_window ({window}) is smaller than data.vocab_prompts ({data.vocab_prompts}): the "
            f"vocabulary could never be counted; at least {counted}"
        )


def _tell_schedule(checkpoint: Path, steps: int, config: Config, message: Callable[[str], None]) -> None:
    """Say what becomes of the learning rate, if the run was to have other ``steps``."""
    info = read_info(checkpoint)
    bent = info.schedule.bent(info.step, steps, config.optimizer)
    if steps > info.step and bent != info.schedule:
        rate = bent.rate(info.step + 1, config.optimizer)
        message(
            f"{steps:,} steps instead of {info.schedule.total:,}: the learning rate goes on with {rate:.2e}, and what "
            "was left of its schedule is spread over the steps to come"
        )


def _told(message: Callable[[str], None]) -> Callable[[int, float], None]:
    """Tells, for each twentieth of the data but the last, how far tokenising is."""
    said = 0

    def progress(done: int, share: float) -> None:
        nonlocal said
        if said < int(20 * share) < 20:
            said = int(20 * share)
            message(f"tokenised {done:,} conversations, {share:.0%}")

    return progress


def _tell_changes(train: PromptSet, message: Callable[[str], None]) -> None:
    for what, count in train.changes.items():
        message(f"data.train: {count:,} changed: {what}")
    for reason, count in count_reasons(train.rejected).items():
        message(f"data.train: {count:,} rejected: {reason}")


def _list_rejected(folder: RunFolder, train: PromptSet, heldout: PromptSet | None) -> None:
    """Each conversation by name; of what was changed in those that are used, the counts."""
    with folder.rejected.open("w") as file:
        for prompts in (train, heldout):
            for name, reason in prompts.rejected if prompts is not None else ():
                file.write(json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n")
            for what, count in prompts.changes.items() if prompts is not None else ():
                file.write(json.dumps({"changed": what, "count": count}, ensure_ascii=False) + "\n")
