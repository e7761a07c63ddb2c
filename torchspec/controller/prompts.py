"""What each sample of a run is made of: its prompt, the answer that is known for it, and so the lease for a worker."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchspec.config.schema import AnswerConfig
from torchspec.contracts import HELDOUT_EPOCH, Answer, Lease, SampleId
from torchspec.data.masks import pack_mask
from torchspec.data.order import sample_seed
from torchspec.data.prompt_set import PromptSet
from torchspec.files import Damage, JsonLines, at_once, read_lines, records

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes the answers of a run, and how: each line of ``answers.jsonl`` says it."""

    target: str
    """Fingerprint of its weights."""
    temperature: float
    top_p: float

    @classmethod
    def of(cls, config: AnswerConfig, fingerprint: str) -> Writer:
        """Where nothing is sampled, ``top_p`` makes no difference."""
        return cls(fingerprint, config.temperature, config.top_p if config.temperature else 1.0)

    def wrote(self, line: dict[str, Any]) -> bool:
        """Whether a line of ``answers.jsonl`` is of this writer."""
        return bool(line.get("writer") == asdict(self))


class Prompts:
    """Looks samples up in the prompt sets and in the book of answers. ``seed``: the run's."""

    def __init__(self, train: PromptSet, heldout: PromptSet | None, answers: AnswerBook, seed: int):
        self._train, self._heldout, self._answers, self._seed = train, heldout, answers, seed

    def name(self, sample: SampleId) -> str:
        return f"{self._prompts(sample).ids[sample.prompt]} (epoch {sample.epoch})"

    def answer(self, sample: SampleId) -> np.ndarray | None:
        """What the target has written for its prompt, in whatever epoch or run, as far as there is room for it now."""
        prompts, row = self._prompts(sample), sample.prompt
        answer = self._answers.get(prompts.input_ids(row))
        return None if answer is None else answer[: prompts.max_answer_tokens[row]]

    def add_answer(self, sample: SampleId, answer: Answer) -> None:
        prompts, row = self._prompts(sample), sample.prompt
        self._answers.add(prompts.ids[row], prompts.input_ids(row), answer)

    def being_answered(self, sample: SampleId, is_leased: Callable[[SampleId], bool]) -> bool:
        """Whether another epoch's sample of this prompt is getting the answer that this one will use."""
        if not self.to_answer(sample):
            return False
        return any(is_leased(sample._replace(epoch=epoch)) for epoch in range(sample.epoch))

    def to_answer(self, sample: SampleId) -> bool:
        """Whether the target has yet to answer its prompt."""
        prompts, row = self._prompts(sample), sample.prompt
        return bool(prompts.max_answer_tokens[row]) and self._answers.length(prompts.input_ids(row)) is None

    def max_tokens(self, sample: SampleId) -> int:
        """That it can have."""
        prompts, row = self._prompts(sample), sample.prompt
        ids, room = prompts.input_ids(row), int(prompts.max_answer_tokens[row])
        if not room:
            return len(ids)
        answered = self._answers.length(ids)
        return len(ids) + (room if answered is None else min(answered, room) - 1)  # the last token is not read

    def describe(self, sample: SampleId) -> Lease:
        """Its lease, without key and credits yet."""
        prompts, row = self._prompts(sample), sample.prompt
        ids, mask, max_answer = prompts.input_ids(row), prompts.loss_mask(row), int(prompts.max_answer_tokens[row])
        if mask is None:
            answer = self.answer(sample)
            if answer is not None:
                read = answer[:-1]  # as when it was written: the last token is not read
                mask = pack_mask(np.arange(len(ids) + len(read)) >= len(ids))
                ids = np.concatenate([ids, read])
        return Lease(
            sample=sample,
            key="",
            input_ids=np.ascontiguousarray(ids, dtype="<i4").tobytes(),
            loss_mask=mask or b"",
            max_new_tokens=max_answer if mask is None else 0,
            seed=sample_seed(self._seed, *sample),
            credit_bytes=0,
        )

    def tokens(self, sample: SampleId) -> tuple[bytes, int | None]:
        """All token ids of a captured sample, packed little-endian int32, and how many are the answered prompt's.

        None where the conversation came with its answers.
        """
        prompts, ids = self._prompts(sample), self.describe(sample).input_ids
        answered = prompts.loss_mask(sample.prompt) is None
        return ids, len(prompts.input_ids(sample.prompt)) if answered else None

    def _prompts(self, sample: SampleId) -> PromptSet:
        prompts = self._heldout if sample.epoch == HELDOUT_EPOCH else self._train
        assert prompts is not None
        return prompts


class AnswerBook:
    """What the target wrote, by prompt. Read where earlier files have it, appended to this run's ``answers.jsonl``.

    An answer belongs to its writer and to the exact tokens of its prompt: those of another target or another
    temperature are passed over, and with another template or another prompt under the same id it is not found.
    Answers stay on the disk; a million of them would fill the controller's memory.

    Args:
        path: the run's ``answers.jsonl``.
        reuse: that of an earlier run.
        told: of damaged lines, whose answers are as if they had not been written.
        put: makes the calls that touch the disk, in order, now or later.
    """

    def __init__(
        self,
        path: Path,
        writer: Writer,
        reuse: Path | None = None,
        told: Callable[[Damage], None] = log.warning,
        put: Callable[..., None] = at_once,
    ):
        self._writer, self._put = asdict(writer), put
        self._lines: dict[bytes, tuple[BinaryIO, int, int]] = {}
        """By prompt: the file, where in it the answer's line begins, and the answer's tokens."""
        self._unwritten: dict[bytes, np.ndarray] = {}
        """Answers that are on their way to the disk."""
        self._file = JsonLines(path, put)
        self._own, self._end = path.open("rb"), path.stat().st_size
        for file in (*([reuse.open("rb")] if reuse else []), self._own):
            for begin, record in records(file, told):
                if writer.wrote(record):
                    self._lines[bytes.fromhex(record["prompt_hash"])] = file, begin, len(record["token_ids"])

    def get(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """int32 token ids, or None where there is no answer."""
        digest = _digest(prompt_ids)
        if (unwritten := self._unwritten.get(digest)) is not None:
            return unwritten
        if (line := self._lines.get(digest)) is None:
            return None
        file, begin, _ = line
        file.seek(begin)
        return np.array(json.loads(file.readline())["token_ids"], dtype=np.int32)

    def length(self, prompt_ids: np.ndarray) -> int | None:
        """Tokens of the answer, or None where there is none."""
        line = self._lines.get(_digest(prompt_ids))
        return None if line is None else line[2]

    def add(self, prompt_id: str, prompt_ids: np.ndarray, answer: Answer) -> None:
        digest = _digest(prompt_ids)
        if digest in self._lines and self._lines[digest][0] is self._own:
            return
        written = {key: value for key, value in asdict(answer).items() if key != "prompt"}
        tokens = np.array(answer.token_ids, np.int32)
        self._lines[digest], self._unwritten[digest] = (self._own, self._end, len(tokens)), tokens
        line = {"id": prompt_id, "prompt_hash": digest.hex(), **written, "writer": self._writer}
        self._end += self._file.write(line)
        self._put(self._unwritten.pop, digest)


def check_reuse(path: Path, writer: Writer) -> None:
    """Raises ValueError: none of the answers in ``path`` is of ``writer``; says what is different."""
    first: dict[str, Any] | None = None
    for line in read_lines(path):
        if writer.wrote(line):
            return
        first = first or line
    if first is None:
        raise ValueError(f"answer.reuse: {path} holds no answer")
    if "writer" not in first:
        raise ValueError(
            f"answer.reuse: {path} does not say which target wrote it, and how: it was not written by this version of "
            "torchspec; leave answer.reuse out and let the target write them again"
        )
    was, now = first["writer"], asdict(writer)
    if was["target"] != now["target"]:
        raise ValueError(
            f"answer.reuse: {path} was written by another target than target.path, and is not what this one would say: "
            "leave answer.reuse out"
        )
    knob = next(name for name in now if was[name] != now[name])
    raise ValueError(
        f"answer.reuse: {path} was written with answer.{knob}={was[knob]}, which is {now[knob]} here: set it so, or "
        "leave answer.reuse out"
    )


def _digest(prompt_ids: np.ndarray) -> bytes:
    """Names a prompt by its token ids."""
    return hashlib.sha256(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes()).digest()[:12]
