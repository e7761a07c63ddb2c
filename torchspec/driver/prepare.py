"""Everything that can be wrong with what the user asked for, found before anything starts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from torchspec.config.schema import Config
from torchspec.controller.ledger_snapshot import LedgerSnapshot, ledger_shape
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import PromptSet, TokenizeOptions, count_reasons
from torchspec.data.survey import Survey, survey
from torchspec.driver.plan import Plan, make_plan, total_steps
from torchspec.driver.resolve import Resolved, resolve
from torchspec.inference.sglang_patch import check_patched
from torchspec.monitor.trackers import check_trackers
from torchspec.run_folder import LEDGER_FILE, RunFolder

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

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, for the schedule."""
        return total_steps(self.config.training, len(self.train))


def prepare(config: Config, resume: bool, message: Callable[[str], None]) -> Prepared:
    """Check target, data, machine and folder. Raises ValueError: one line with what is wrong and how to mend it."""
    check_patched()
    check_trackers(config.monitor)
    resolved = resolve(config)
    config = resolved.config
    folder = RunFolder(config.run_dir)
    resume_from = _check_folder(folder, resume)
    message("reading and tokenising the prompts")
    train, heldout = read_data(config, partial(load_or_build, progress=_told(message)))
    _tell_changes(train, message)
    if resume_from is not None:
        LedgerSnapshot.from_json((resume_from / LEDGER_FILE).read_text(), ledger_shape(config, train))
    plan = _plan(resolved, len(train), train.rejected, train.fully_answered, len(heldout) if heldout else 0)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not resume:
        _list_rejected(folder, train, heldout)
    return Prepared(resolved, train, heldout, plan, folder, mark=f"{folder.path}#{secrets.token_hex(8)}")


def make_plan_for(config: Config) -> tuple[Plan, Survey]:
    """The figures of a run and of its data, of which a sample is tokenised. Raises ValueError: it could not run."""
    resolved = resolve(config)
    train, heldout = read_data(resolved.config, survey)
    answered = not train.answer_tokens
    return _plan(resolved, train.rows, train.rejected, answered, heldout.rows if heldout else 0), train


def read_data(config: Config, read: Callable[..., T]) -> tuple[T, T | None]:
    """The training and the held-out data, by ``load_or_build`` or by ``survey``, which take the same arguments."""
    data, evaluation = config.data, config.evaluation

    def read_from(knob: str, source: str, limit: int | None) -> T:
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
        return read(source, Path(config.target.path).expanduser(), options, data.cache_dir, knob)

    train = read_from("data.train", data.train, data.limit)
    if evaluation.heldout is None:
        return train, None
    return train, read_from("evaluation.heldout", evaluation.heldout, evaluation.samples)


def _plan(resolved: Resolved, rows: int, rejected: Sequence[tuple[str, str]], answered: bool, heldout: int) -> Plan:
    """For so many ``rows`` of training data, and so many held-out ones. ``answered``: no row waits for an answer."""
    config, vocab_prompts = resolved.config, 0
    if rows == 0:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3])
        raise ValueError(f"data.train {config.data.train}: no usable conversation is left ({reasons})")
    if not answered:
        resolved.draft.check_answers(config.answer.max_tokens)
        if resolved.draft.vocab_size is not None:
            vocab_prompts = min(config.data.vocab_prompts, rows)
    return make_plan(resolved, heldout, vocab_prompts)


def _check_folder(folder: RunFolder, resume: bool) -> Path | None:
    """The checkpoint to resume from; None for a fresh start."""
    if not resume:
        if folder.exists():
            raise ValueError(
                f"the run {folder.path} exists already: continue it with `torchspec resume {folder.path}`, or choose "
                "another name with run.name=..."
            )
        return None
    if not folder.exists():
        raise ValueError(f"there is nothing to resume in {folder.path}: it has no config.yaml")
    return folder.newest_checkpoint()


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
