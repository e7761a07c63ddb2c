"""Drafts that know a few answers by heart, served by a real SGLang engine, and held against a simulation.

A draft is trained by the product's own step. So its acceptance says whether training, export and server agree on
alignment, target layers, vocabulary and positions; and every verify step of the server must be as a plain simulation
(``tests/oracles``) says. All in float32, where an engine's greedy answers are those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchspec.drafts.draft import Batch, DraftOptions
from torchspec.drafts.export import export_draft, read_spec
from torchspec.drafts.registry import KINDS
from torchspec.evaluation.prompts import EvaluationPrompt
from torchspec.evaluation.serving import Job, Reply, serve
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import load_target_head

NUM_PROMPTS, ANSWER_TOKENS, CONCURRENCY = 4, 24, 3

Simulation = Callable[[Tensor, Tensor, int, int], list[int]]
"""Of the target's states [S, A] of a text, the text [S], and how many tokens of it are prompt and answer: the verify
steps in which so many drafts are right. The text goes on behind the answer by as many tokens as a step drafts."""


@dataclass(frozen=True)
class Target:
    path: Path
    model: PreTrainedModel

    @classmethod
    def load(cls, path: Path) -> Target:
        return cls(path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())

    @torch.no_grad()
    def states(self, text: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """States [S, A] of the draft's layers and last hidden states [S, H] (after the final norm) of ``text``."""
        hidden = self.model(text[None], output_hidden_states=True).hidden_states
        return torch.cat([hidden[k + 1][0] for k in layers], dim=-1), hidden[-1][0]

    @torch.no_grad()
    def go_on(self, text: Tensor, count: int) -> Tensor:
        """``text`` and ``count`` greedy tokens, whatever they are."""
        step = self.model(text[None], use_cache=True)
        for _ in range(count):
            token = step.logits[0, -1:].argmax(-1)
            text = torch.cat([text, token])
            step = self.model(token[None], past_key_values=step.past_key_values, use_cache=True)
        return text


def learnt_by_heart(
    target: Target, prompts: list[EvaluationPrompt], folder: Path, kind: str, *, steps: int, lr: float, **knobs: Any
) -> Path:
    """An exported draft that has learnt the answers to all prompts but the last."""
    texts = [target.go_on(torch.tensor(prompt.input_ids), ANSWER_TOKENS) for prompt in prompts[:-1]]
    spec_class, checkpoint = KINDS[kind], TargetCheckpoint(target.path)
    draft_ids = torch.arange(checkpoint.shape.vocab_size)
    if "vocab_size" in spec_class.Knobs.model_fields:
        draft_ids = torch.cat([*(text[-ANSWER_TOKENS:] for text in texts), draft_ids[::97]]).unique()
        knobs |= {"vocab_size": len(draft_ids)}
    spec = spec_class.of(spec_class.Knobs(kind=kind, **knobs), checkpoint, None)
    head = load_target_head(checkpoint, torch.float32, "cpu", draft_ids)
    torch.manual_seed(0)
    draft = spec.build(head, checkpoint, DraftOptions())
    batch = _batch(target, texts, spec.layers)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        output = draft(replace(batch, seeds_B=batch.seeds_B + step), head)
        optimizer.zero_grad()
        (output.total / output.denominator).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
    assert (output.correct_K / output.counted_K).min() > 0.8, "the draft has not learnt its texts"
    return export_draft(spec, draft.state_dict(), draft_ids, folder, "float32")


def _batch(target: Target, texts: list[Tensor], layers: tuple[int, ...]) -> Batch:
    states = [target.states(text, layers) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    masks = [torch.arange(len(text)) >= len(text) - ANSWER_TOKENS for text in texts]
    return Batch(
        hs_BSA=pad([aux for aux, _ in states], batch_first=True),
        lhs_BSH=pad([last for _, last in states], batch_first=True),
        ids_BS=pad(texts, batch_first=True),
        loss_mask_BS=pad(masks, batch_first=True),
        lengths_B=torch.tensor([len(text) for text in texts]),
        seeds_B=1000 * torch.arange(len(texts)),
    )


def served_with(folder: Path | None, target: Target, prompts: list[EvaluationPrompt], drafted: int = 0) -> list[Reply]:
    """The engine's answers, with ``drafted`` tokens a verify step, or without a draft."""
    job = Job(
        target=str(target.path),
        prompts=[list(prompt.input_ids) for prompt in prompts],
        max_tokens=ANSWER_TOKENS,
        dtype="float32",
        device="cpu",
        threads=1,
        concurrency=CONCURRENCY,
    )
    if folder is not None:
        job = replace(job, draft=str(folder), speculation=read_spec(folder).server_args(drafted))
    return serve(job).replies


def accept_length(replies: list[Reply]) -> float:
    """Tokens of a verify step: the right drafts, and the one that the target adds."""
    steps = [right for reply in replies for right, times in enumerate(reply.histogram) for _ in range(times)]
    return 1 + sum(steps) / len(steps)


def require_as_simulated(
    simulation: Simulation,
    layers: tuple[int, ...],
    drafted: int,
    target: Target,
    prompts: list[EvaluationPrompt],
    replies: list[Reply],
) -> None:
    for prompt, reply in zip(prompts, replies, strict=True):
        asked, answered = torch.tensor(prompt.input_ids), torch.tensor(reply.output_ids)
        text = target.go_on(asked, len(answered) + drafted)
        assert torch.equal(text[len(asked) : len(text) - drafted], answered), "not the answer of transformers"
        expected = simulation(target.states(text, layers)[0], text, len(asked), len(answered))
        histogram = reply.histogram + [0] * (drafted + 1 - len(reply.histogram))
        assert histogram == expected, f"{prompt.id}: other drafts are right"
