"""Makes a :class:`PromptSet` out of JSONL files, once for the same files, tokenizer and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np

from torchspec.data.conversations import BadLine, Conversation, read_conversations, require_clean, short_names
from torchspec.data.prompt_set import PromptSet, TokenizeOptions
from torchspec.data.prompt_sources import find_files
from torchspec.data.tokenize import ChatTokenizer, Refusal, Tokenized, read_template

FORMAT = 1
"""Part of the cache's hash: raise it whenever the rows made from the same files change."""
BATCH = 512
"""Conversations tokenised at once."""
TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}


def load_or_build(
    source: str,
    tokenizer: Path | str,
    options: TokenizeOptions,
    cache_dir: Path,
    knob: str = "data.train",
    progress: Callable[[int], None] = lambda done: None,
) -> PromptSet:
    """Tokenise ``source`` (path, glob or ``builtin:`` name), or read what an earlier run has made of it.

    Args:
        tokenizer: folder of the target checkpoint.
        cache_dir: the result is kept in ``{cache_dir}/prompts``.
        knob: the setting that holds ``source``, for messages.
        progress: called with the number of conversations done so far.

    Raises:
        ValueError: nothing at ``source``, bad lines with ``on_error="stop"``, no usable tokenizer or template.
    """
    tokenizer = Path(tokenizer)
    files = find_files(source, cache_dir, knob)
    options = replace(options, chat_template=read_template(options.chat_template))
    content_hash = _hash_inputs(files, tokenizer, options)
    path = cache_dir.expanduser() / "prompts" / f"{content_hash}.npz"
    if path.exists():
        return PromptSet.load(path)
    chat = ChatTokenizer(tokenizer, options.chat_template, options.trust_remote_code)
    if options.on_error == "stop":
        require_clean(files, options.limit)
    prompts = tokenise(read_conversations(files, options.limit), chat, options, content_hash, progress)
    prompts.save(path)
    return prompts


def tokenise(
    lines: Iterator[Conversation | BadLine],
    chat: ChatTokenizer,
    options: TokenizeOptions,
    content_hash: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> PromptSet:
    """Make a prompt set of ``lines``, which is not saved."""
    ids: list[str] = []
    tokens, masks = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.uint8)]
    max_answer_tokens: list[int] = []
    rejected: list[tuple[str, str]] = []
    done = 0
    while batch := list(islice(lines, BATCH)):
        rejected += [(line.name, line.reason) for line in batch if isinstance(line, BadLine)]
        conversations = [line for line in batch if isinstance(line, Conversation)]
        for conversation, row in zip(conversations, chat.encode(conversations, options.last_turn_only), strict=True):
            if isinstance(row, Refusal):
                rejected.append((conversation.id, row.reason))
            elif reason := _refuse(row, options):
                rejected.append((conversation.id, reason))
            else:
                ids.append(conversation.id)
                tokens.append(row.input_ids)
                max_answer_tokens.append(0 if row.loss_mask is not None else _answer_room(row, options))
                if row.loss_mask is not None:
                    masks.append(np.packbits(row.loss_mask))
        done += len(batch)
        progress(done)
    return PromptSet(
        ids=ids,
        token_ids=np.concatenate(tokens),
        offsets=np.cumsum([len(row) for row in tokens], dtype=np.int64),
        packed_masks=np.concatenate(masks),
        max_answer_tokens=np.array(max_answer_tokens, dtype=np.int32),
        rejected=rejected,
        content_hash=content_hash,
    )


def _answer_room(row: Tokenized, options: TokenizeOptions) -> int:
    """Most tokens of the answer."""
    return min(options.max_new_tokens, options.max_seq_length - len(row.input_ids))


def _refuse(row: Tokenized, options: TokenizeOptions) -> str:
    """Why a conversation cannot be a row; empty if it can."""
    length, limit, needed = len(row.input_ids), options.max_seq_length, options.min_loss_tokens
    if length > limit:
        return f"{length} tokens are more than data.max_seq_length={limit}"
    if row.loss_mask is not None:
        count = int(row.loss_mask.sum())
        return "" if count >= needed else f"{count} tokens to learn from are fewer than data.min_loss_tokens={needed}"
    room = _answer_room(row, options)
    if room >= needed:
        return ""
    return (
        f"a prompt of {length} tokens leaves {room} for the answer (data.max_seq_length={limit}, "
        f"answer.max_tokens={options.max_new_tokens}), fewer than data.min_loss_tokens={needed}"
    )


def _hash_inputs(files: Sequence[Path], tokenizer: Path, options: TokenizeOptions) -> str:
    tokenizer_files = sorted(f for f in tokenizer.rglob("*") if f.suffix in TOKENIZER_SUFFIXES and f.is_file())
    digest = hashlib.sha256(json.dumps([FORMAT, version("transformers"), asdict(options)]).encode())
    names = [*short_names(files), *(str(f.relative_to(tokenizer)) for f in tokenizer_files)]
    for name, file in zip(names, [*files, *tokenizer_files], strict=True):
        with file.open("rb") as content:
            digest.update(f"{name}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]
