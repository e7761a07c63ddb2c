"""What a source of conversations comes to, for a plan: all lines are read, and an even sample of them tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchspec.data.conversations import BadLine, Conversation, read_conversations, require_clean
from torchspec.data.prompt_builder import tokenise
from torchspec.data.prompt_set import TokenizeOptions
from torchspec.data.prompt_sources import find_files
from torchspec.data.tokenize import ChatTokenizer

SAMPLE = 512
"""Up to twice as many conversations are tokenised, and so counted exactly."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Counts over all conversations, estimated from the sample unless it holds all of them."""

    rows: int
    """Conversations that can be used."""
    tokens: int
    """Of those: prompts, and the answers that are given."""
    answer_tokens: int
    """The most that the target writes to prompts without an answer."""
    rejected: tuple[tuple[str, str], ...]
    """Name and reason of each conversation of the sample that cannot be used."""
    exact: bool


def survey(source: str, tokenizer_path: Path, options: TokenizeOptions, cache_dir: Path, knob: str) -> Survey:
    """Look through ``source``; the arguments are those of :func:`load_or_build`.

    Raises:
        ValueError: nothing at ``source``, bad lines with ``on_error="stop"``, no usable tokenizer or template.
    """
    files = find_files(source, cache_dir, knob)
    if options.on_error == "stop":
        require_clean(files, options.limit)
    count, sample = _sample(files, options.limit)
    chat = ChatTokenizer(tokenizer_path, options.chat_template, options.trust_remote_code)
    prompts = tokenise(iter(sample), chat, options)
    scale = count / max(1, len(sample))
    return Survey(
        rows=round(len(prompts) * scale),
        tokens=round(len(prompts.token_ids) * scale),
        answer_tokens=round(int(prompts.max_answer_tokens.sum()) * scale),
        rejected=tuple(prompts.rejected),
        exact=len(sample) == count,
    )


def _sample(files: list[Path], limit: int | None) -> tuple[int, list[Conversation | BadLine]]:
    """The number of lines, and every n-th of them, for the least power of two n with which they fit the sample."""
    count, stride = 0, 1
    kept: list[Conversation | BadLine] = []
    for line in read_conversations(files, limit):
        if count % stride == 0:
            kept.append(line)
        if len(kept) > 2 * SAMPLE:
            kept, stride = kept[::2], 2 * stride
        count += 1
    return count, kept
