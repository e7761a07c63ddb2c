"""The figures of an evaluation and how they follow from what the server counted.

A *verify step* is one forward pass of the target over the token it has just written and ``num_draft_tokens`` drafted
ones. It accepts the drafts up to the first wrong one and writes one token itself. All figures come from one histogram:
``histogram[k]`` verify steps in which exactly ``k`` drafts were right.

    accept length            1 + correct drafts / verify steps: tokens per forward pass of the target
    position acceptance k    share of verify steps in which drafts 1..k were all right
                             (so accept length = 1 + sum of position acceptances)

SGLang's own ``spec_accept_length`` is reported beside it: completion tokens / verify steps. It differs a little, since
it counts the first token of an answer, which prefill writes, and does not count what a last step accepts beyond the
answer's end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchspec.files import write_atomically
from torchspec.monitor.record.recorder import EVENT_LINES, EVENT_RECENT, EventLog
from torchspec.monitor.series import Series
from torchspec.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class PromptResult:
    """One prompt and what the server with the draft made of it."""

    id: str
    category: str | None
    output_ids: list[int]
    histogram: list[int]
    identical: bool
    """Whether the answer without the draft is the same."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often drafts were right, over a group of prompts."""

    prompts: int
    accept_length: float
    """1 + correct drafts / verify steps; 1 when the draft is never right, ``num_draft_tokens + 1`` at most."""
    position_acceptance: tuple[float, ...]
    """One entry per drafted token: share of verify steps in which it and all before it were right."""
    server_accept_length: float
    """The same by SGLang's definition: completion tokens / verify steps."""
    verify_steps: int
    correct_drafts: int
    output_tokens: int

    @classmethod
    def of(cls, prompts: Sequence[PromptResult], num_draft_tokens: int) -> Acceptance:
        """Sum up ``prompts``. (A histogram is as long as its best step needed.)

        Raises:
            ValueError: there was no verify step; every answer ended with its first token.
        """
        histograms = [prompt.histogram for prompt in prompts]
        output_tokens = sum(len(prompt.output_ids) for prompt in prompts)
        steps = [sum(h[k] for h in histograms if k < len(h)) for k in range(num_draft_tokens + 1)]
        verify_steps = sum(steps)
        if not verify_steps:
            raise ValueError("the server never verified a draft: every answer ended at its first token")
        correct = sum(k * n for k, n in enumerate(steps))
        return cls(
            prompts=len(prompts),
            accept_length=1 + correct / verify_steps,
            position_acceptance=tuple(sum(steps[k:]) / verify_steps for k in range(1, num_draft_tokens + 1)),
            server_accept_length=output_tokens / verify_steps,
            verify_steps=verify_steps,
            correct_drafts=correct,
            output_tokens=output_tokens,
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """All prompts, served ``concurrency`` at a time by an engine that is warm. Prefill is part of the time."""

    output_tokens: int
    seconds: float
    tokens_per_s: float

    @classmethod
    def of(cls, output_tokens: int, seconds: float) -> Speed:
        return cls(output_tokens, seconds, output_tokens / seconds)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How an evaluation is served."""

    num_draft_tokens: int = 3
    """Tokens drafted for each verify step."""
    max_tokens: int = 100
    """Longest answer."""
    dtype: str = "auto"
    """Of target and draft; ``auto`` is the one that is fast on the device. In ``float32`` the answers with and without
    the draft are the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``cpu``, ``cuda``, or ``auto`` for CUDA where there is one."""
    threads: int | None = None
    """CPU threads of the engine. Default: all cores."""
    concurrency: int = 32
    """Requests decoded together."""
    chat_template: str | None = None
    """A Jinja chat template (text or path) instead of the tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of the chat template."""
    columns: dict[str, str] = field(default_factory=dict)
    """What prompts call the keys of their rows, as ``data.columns``."""
    trust_remote_code: bool = False
    """Run Python code that ships with the target."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """More arguments of ``sglang.Engine``."""

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "max_tokens", "concurrency", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        for name, valid in (("dtype", ("auto", "bfloat16", "float16", "float32")), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(valid)}")


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """A draft in a real SGLang server, and the same server without it."""

    draft: str
    target: str
    prompt_set: str
    settings: EvaluationSettings
    """With ``device``, ``dtype`` and ``threads`` as they were chosen."""
    sglang_version: str
    overall: Acceptance
    categories: dict[str, Acceptance]
    """Empty when the prompts name no categories."""
    with_draft: Speed
    without_draft: Speed
    speed_up: float
    """Tokens/s with the draft over tokens/s without it."""
    prompts: list[PromptResult]
    identical_outputs: int
    """Prompts whose greedy answer is the same with and without the draft. All of them in float32; in bfloat16 a batch
    of several tokens rounds otherwise than one token, and answers part where two words are almost equally likely."""

    def save(self, path: Path) -> None:
        """Write the result as JSON, complete or not at all."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def record(self, run: RunFolder) -> None:
        """Note in the run that the draft comes from what a real server made of it."""
        overall, now = self.overall, time.time()
        noted = {
            "time": now,
            "draft": self.draft,
            "prompt_set": self.prompt_set,
            "num_draft_tokens": self.settings.num_draft_tokens,
            "accept_length": overall.accept_length,
            "server_accept_length": overall.server_accept_length,
            "position_acceptance": overall.position_acceptance,
            "speed_up": self.speed_up,
        }
        Series(run.evaluations, EVENT_LINES, EVENT_RECENT).append(json.dumps(noted).encode() + b"\n")
        message = f"measured in a server on {self.prompt_set}: accept length {overall.accept_length:.2f}"
        EventLog(run.path).write(now, "evaluated", message, accept_length=overall.accept_length)
