"""Everything that can be wrong with what the user asked for, found before anything starts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torchspec.config.schema import Config
from torchspec.controller.ledger_snapshot import LedgerSnapshot, ledger_shape
from torchspec.controller.prompts import Writer, check_reuse
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import PromptSet, TokenizeOptions
from torchspec.data.survey import Survey, survey
from torchspec.driver.plan import Plan, make_plan, total_steps
from torchspec.driver.resolve import Resolved, resolve
from torchspec.inference.sglang_patch import check_patched
from torchspec.monitor.trackers import check_trackers
from torchspec.run_folder import LEDGER_FILE, RunFolder
from torchspec.training.checkpoint import read_info

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
        return total_steps(self.config.training, len(self.train))


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
    resume_from = folder.find_checkpoint(start) if resume else None
    message("reading and tokenising the prompts")
    train, heldout = _read(config, load_or_build)
    if resume_from is not None:
        LedgerSnapshot.from_json((resume_from / LEDGER_FILE).read_text(), ledger_shape(config, train))
        _tell_schedule(resume_from, total_steps(config.training, len(train)), config, message)
    plan = _plan(resolved, len(train), train.rejected, train.fully_answered, len(heldout) if heldout else 0)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not resume:
        _list_rejected(folder, train, heldout)
    mark, go_back_to = f"{folder.path}#{secrets.token_hex(8)}", resume_from if start != "latest" else None
    return Prepared(resolved, train, heldout, plan, folder, mark, go_back_to)


def make_plan_for(config: Config) -> tuple[Plan, Survey]:
    """The figures of a run and of its data, of which a sample is tokenised. Raises ValueError: it could not run."""
    resolved = resolve(config)
    train, heldout = _read(resolved.config, survey)
    answered = not train.answer_tokens
    return _plan(resolved, train.rows, train.rejected, answered, heldout.rows if heldout else 0), train


def _read(config: Config, read: Callable[..., T]) -> tuple[T, T | None]:
    """The training and the held-out data, by ``load_or_build`` or by ``survey``, which take the same arguments."""
    data, evaluation = config.data, config.evaluation

    def read_from(knob: str, source: str, limit: int | None) -> T:
        options = TokenizeOptions(
            chat_template=data.chat_template,
            max_seq_length=data.max_seq_length,
            min_loss_tokens=data.min_loss_tokens,
            last_turn_only=data.last_turn_only,
            max_new_tokens=config.answer.max_tokens,
            on_error=data.on_error,
            limit=limit,
            trust_remote_code=config.target.trust_remote_code,
        )
        return read(source, Path(config.target.path), options, data.cache_dir, knob)

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


def _list_rejected(folder: RunFolder, train: PromptSet, heldout: PromptSet | None) -> None:
    with folder.rejected.open("w") as file:
        for prompts in (train, heldout):
            for name, reason in prompts.rejected if prompts else ():
                file.write(json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n")
