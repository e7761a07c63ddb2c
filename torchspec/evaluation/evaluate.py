"""Measures a draft: the same prompts, greedily, in a SGLang server with the draft and in one without it.

The engines run one after the other, never two at once. What the figures mean is written in ``result.py``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torchspec.data.builtin_target import CACHE
from torchspec.data.tokenize import ChatTokenizer
from torchspec.drafts.export import DraftExport, validate_export
from torchspec.evaluation.prompts import EvaluationPrompt, load_prompts
from torchspec.evaluation.result import Acceptance, EvaluationResult, EvaluationSettings, PromptResult, Speed
from torchspec.evaluation.serving import Job, Served, serve
from torchspec.hardware import fast_dtype, pick_device
from torchspec.inference.sglang_models import check_served
from torchspec.target.checkpoint import TargetCheckpoint, find_checkpoint
from torchspec.target.shape import TargetShape


def run_evaluation(
    draft_folder: str | Path,
    target_path: str | Path,
    prompt_set: str = "builtin:heldout",
    settings: EvaluationSettings | None = None,
    *,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> EvaluationResult:
    """``torchspec eval``: serve a prompt set with and without the draft, greedily.

    Args:
        target_path: a folder, or a model's name on the Hugging Face Hub.
        prompt_set: path, glob, or a set by name (``builtin:heldout``, ``builtin:mtbench``, ``builtin:humaneval``).
        limit: use the first so many prompts.
        progress: told what is about to happen, and which prompts cannot be used.

    Raises:
        ValueError: the draft, the target or the prompt set cannot be used; one clear line.
        ServingError: the server failed, or did not load all of the draft.
    """
    export, settings = validate_export(draft_folder), _resolve(settings or EvaluationSettings())
    target = TargetCheckpoint(find_checkpoint(target_path), settings.trust_remote_code)
    require_match(export, target)
    speculation = export.spec.server_args(settings.num_draft_tokens)
    check_served(target, speculation["speculative_algorithm"])
    trusted, arguments = settings.trust_remote_code, settings.template_kwargs
    chat = ChatTokenizer(target.path, settings.chat_template, trusted, arguments)
    prompts = load_prompts(prompt_set, chat, CACHE, limit, settings.columns, progress)
    _require_room(prompts, target.shape, settings)
    plain_job = Job(
        target=str(target.path),
        prompts=[list(prompt.input_ids) for prompt in prompts],
        max_tokens=settings.max_tokens,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads or 1,
        concurrency=min(settings.concurrency, len(prompts)),
        end_token_ids=list(target.end_token_ids),
        trust_remote_code=settings.trust_remote_code,
        engine_args=settings.engine_args,
    )
    progress(f"serving {len(prompts)} prompts with the draft")
    drafted = serve(replace(plain_job, draft=str(export.folder), speculation=speculation))
    progress(f"serving {len(prompts)} prompts without it")
    plain = serve(plain_job)
    return _compare(drafted, plain, prompts, settings, str(draft_folder), str(target_path), prompt_set)


def require_match(export: DraftExport, target: TargetCheckpoint) -> None:
    """Refuse a draft that was made for another target.

    Raises:
        ValueError: the sizes differ; names both.
    """
    draft, shape = export.spec, target.shape
    for what, of_draft, of_target in (
        ("hidden size", draft.target.hidden_size, shape.hidden_size),
        ("vocabulary", draft.target.vocab_size, shape.vocab_size),
    ):
        if of_draft != of_target:
            raise ValueError(
                f"the draft {export.folder} was made for another target: {what} {of_draft}, "
                f"but the target's is {of_target}"
            )
    if draft.layers[-1] >= target.num_layers:
        raise ValueError(
            f"the draft {export.folder} was made for another target: it reads layers {list(draft.layers)}, "
            f"but the target has {target.num_layers}"
        )


def _resolve(settings: EvaluationSettings) -> EvaluationSettings:
    device = pick_device(settings.device, "device")
    dtype = fast_dtype(device) if settings.dtype == "auto" else settings.dtype
    return replace(settings, device=device, dtype=dtype, threads=settings.threads or os.cpu_count())


def _require_room(prompts: Sequence[EvaluationPrompt], target: TargetShape, settings: EvaluationSettings) -> None:
    room = target.max_position_embeddings - settings.max_tokens - settings.num_draft_tokens
    for prompt in prompts:
        if len(prompt.input_ids) > room:
            raise ValueError(
                f"prompt {prompt.id} has {len(prompt.input_ids)} tokens; with max_tokens={settings.max_tokens} it "
                f"does not fit into the target's context of {target.max_position_embeddings}"
            )


def _compare(
    drafted: Served,
    plain: Served,
    prompts: Sequence[EvaluationPrompt],
    settings: EvaluationSettings,
    draft: str,
    target: str,
    prompt_set: str,
) -> EvaluationResult:
    """All figures, from what the two engines answered."""
    results = [
        PromptResult(prompt.id, prompt.category, a.output_ids, a.histogram, a.output_ids == b.output_ids)
        for prompt, a, b in zip(prompts, drafted.replies, plain.replies, strict=True)
    ]
    categories: dict[str, list[PromptResult]] = defaultdict(list)
    for result in results:
        if result.category is not None:
            categories[result.category].append(result)
    with_draft, without_draft = (Speed.of(served.output_tokens, served.seconds) for served in (drafted, plain))
    return EvaluationResult(
        draft=draft,
        target=target,
        prompt_set=prompt_set,
        settings=settings,
        sglang_version=drafted.sglang_version,
        overall=Acceptance.of(results, settings.num_draft_tokens),
        categories={
            category: Acceptance.of(members, settings.num_draft_tokens)
            for category, members in categories.items()
            if any(member.histogram for member in members)
        },
        with_draft=with_draft,
        without_draft=without_draft,
        speed_up=with_draft.tokens_per_s / without_draft.tokens_per_s,
        prompts=results,
        identical_outputs=sum(result.identical for result in results),
    )
