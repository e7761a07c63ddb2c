"""Makes a :class:`PromptSet` out of files of conversations, once for the same files, tokenizer and options.

Many conversations are tokenised by a process a core; what comes back is written down at once, so that no process ever
holds more than a few batches. An interrupted build leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from torchspec.data.chat_template import read_template
from torchspec.data.conversations import Conversation, Pretokenized, Rejected, UniqueNames, read_row, require_clean
from torchspec.data.prompt_set import PromptSet, PromptWriter, TokenizeOptions
from torchspec.data.prompt_sources import find_files
from torchspec.data.rows import Row, read_rows, short_names
from torchspec.data.tokenize import ChatTokenizer, Refusal, Tokenized

FORMAT = 3
"""Part of the cache's hash: raise it whenever the rows made from the same files change."""
BATCH = 512
"""Rows tokenised at once."""
FEW_BATCHES = 16
"""Up to here, starting processes would take longer than they save."""
TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
RENAMED = "id had been there before: a suffix makes it another"
Progress = Callable[[int, float], None]
"""Told of the rows done so far, and of the share of all that they are."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the set to be."""

    id: str
    input_ids: np.ndarray
    """int32 [S]"""
    loss_mask: np.ndarray | None
    """bool [S]"""
    max_answer_tokens: int
    changes: tuple[str, ...]


def load_or_build(
    source: str,
    tokenizer: Path | str,
    options: TokenizeOptions,
    cache_dir: Path,
    knob: str = "data.train",
    progress: Progress = lambda done, share: None,
) -> PromptSet:
    """Tokenise ``source`` (see ``data.train``), or read what an earlier run has made of it.

    Args:
        tokenizer: folder of the target checkpoint.
        cache_dir: the result is kept in ``{cache_dir}/prompts``, which is made for its owner alone.
        knob: the setting that holds ``source``, for messages.

    Raises:
        ValueError: nothing at ``source``, malformed rows with ``on_error="stop"``, no usable tokenizer or template.
    """
    tokenizer = Path(tokenizer)
    files = find_files(source, cache_dir, knob)
    options = replace(options, chat_template=read_template(options.chat_template))
    content_hash = _hash_inputs(files, tokenizer, options)
    folder = cache_dir.expanduser() / "prompts" / content_hash
    if not folder.exists():
        chat = open_tokenizer(tokenizer, options)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
            complete = Path(scratch, "set")
            complete.mkdir()
            checked = _checked(files, chat, tokenizer, options, progress)
            with PromptWriter(complete, content_hash) as writer, closing(checked) as encoded:
                for one in accepted(encoded, options.limit, writer.rejected, writer.changes):
                    writer.add(one.id, one.input_ids, one.loss_mask, one.max_answer_tokens)
            try:
                os.rename(complete, folder)
            except OSError:
                if not folder.exists():  # otherwise another builder was first
                    raise
    return PromptSet.load(folder)


def open_tokenizer(tokenizer: Path, options: TokenizeOptions) -> ChatTokenizer:
    """Raises ValueError: no usable tokenizer or template."""
    return ChatTokenizer(tokenizer, options.chat_template, options.trust_remote_code, options.template_kwargs)


def encode_rows(rows: Sequence[Row], chat: ChatTokenizer, options: TokenizeOptions) -> list[Prompt | Rejected]:
    """What becomes of each of ``rows``."""
    found = [read_row(row, options.columns) for row in rows]
    conversations = [one for one in found if isinstance(one, Conversation)]
    encoded = iter(chat.encode(conversations, options.last_turn_only))
    prompts: list[Prompt | Rejected] = []
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, Rejected):
            prompts.append(one)
            continue
        tokenized = _as_it_is(one, len(chat.tokenizer)) if isinstance(one, Pretokenized) else next(encoded)
        fitted = tokenized if isinstance(tokenized, Refusal) else _fit(one.id, one.changes, tokenized, options)
        prompts.append(Rejected(one.id, row.where, fitted.reason) if isinstance(fitted, Refusal) else fitted)
    return prompts


def accepted(
    encoded: Iterator[Prompt | Rejected],
    limit: int | None,
    rejected: list[tuple[str, str]],
    changes: Counter[str],
) -> Iterator[Prompt]:
    """The rows of a set, each under a name of its own. Adds the others to ``rejected``, and counts ``changes``."""
    unique, usable = UniqueNames(), 0
    for one in encoded:
        if usable == limit:
            return
        if isinstance(one, Rejected) and one.malformed:
            rejected.append((one.id, one.reason))
            continue
        usable += 1
        name = unique(one.id)
        if name != one.id:
            changes[RENAMED] += 1
        if isinstance(one, Rejected):
            rejected.append((name, one.reason))
        else:
            changes.update(one.changes)
            yield replace(one, id=name)


def _checked(
    files: Sequence[Path], chat: ChatTokenizer, tokenizer: Path, options: TokenizeOptions, progress: Progress
) -> Generator[Prompt | Rejected, None, None]:
    """What becomes of every row. Raises ValueError: one is malformed, and that is to stop us."""
    done = 0
    with closing(_encode_all(read_rows(files), chat, tokenizer, options)) as batches:
        for share, encoded in batches:
            if options.on_error == "stop" and any(isinstance(one, Rejected) and one.malformed for one in encoded):
                require_clean(files, options.limit, options.columns)
            yield from encoded
            done += len(encoded)
            progress(done, share)


# ---- processes ----


def _encode_all(
    rows: Iterator[Row], chat: ChatTokenizer, tokenizer: Path, options: TokenizeOptions
) -> Generator[tuple[float, list[Prompt | Rejected]], None, None]:
    """Batches of what becomes of ``rows``, in order, each with the share of all rows that ends with it."""
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    first = list(islice(batches, FEW_BATCHES))
    processes = len(os.sched_getaffinity(0))
    if len(first) < FEW_BATCHES or processes == 1:
        for batch in chain(first, batches):
            yield batch[-1].share, encode_rows(batch, chat, options)
        return
    with _workers(processes, tokenizer, options) as pool:
        waiting: deque[tuple[float, Future[list[Prompt | Rejected]]]] = deque()
        for batch in chain(first, batches):
            waiting.append((batch[-1].share, _submit(pool, batch)))
            if len(waiting) > 2 * processes:
                share, oldest = waiting.popleft()
                yield share, oldest.result()
        for share, future in waiting:
            yield share, future.result()


@contextmanager
def _workers(processes: int, tokenizer: Path, options: TokenizeOptions) -> Iterator[ProcessPoolExecutor]:
    """Processes that tokenise, spawned: this one may have threads, and a fork would copy their locks."""
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (tokenizer, options))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: list[Row]) -> Future[list[Prompt | Rejected]]:
    """A worker may be started here: it inherits that Ctrl-C is none of its business."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode_in_worker, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[ChatTokenizer, TokenizeOptions]
"""What a worker works with, in its own process."""


def _start_worker(tokenizer: Path, options: TokenizeOptions) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core
    _worker = open_tokenizer(tokenizer, options), options


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[Row]) -> list[Prompt | Rejected]:
    return encode_rows(batch, *_worker)


# ---- one row ----


def _as_it_is(row: Pretokenized, vocab_size: int) -> Tokenized | Refusal:
    if max(row.input_ids) >= vocab_size:
        return Refusal(f"input_ids are not of this tokenizer: {max(row.input_ids)} is none of its {vocab_size} tokens")
    return Tokenized(np.array(row.input_ids, dtype=np.int32), np.array(row.loss_mask, dtype=bool))


def _fit(name: str, changes: tuple[str, ...], row: Tokenized, options: TokenizeOptions) -> Prompt | Refusal:
    """A row of the set, or why it cannot be one."""
    input_ids, loss_mask, changes = row.input_ids, row.loss_mask, (*changes, *row.changes)
    limit, needed = options.max_seq_length, options.min_loss_tokens
    if len(input_ids) > limit:
        if options.too_long == "reject" or loss_mask is None:
            return Refusal(f"longer than data.max_seq_length={limit}: {len(input_ids)} tokens")
        input_ids, loss_mask = input_ids[:limit], loss_mask[:limit]
        changes = (*changes, f"cut to data.max_seq_length={limit} tokens")
    if loss_mask is not None:
        if (count := int(loss_mask.sum())) < needed:
            return Refusal(f"fewer tokens to learn from than data.min_loss_tokens={needed}: {count}")
        return Prompt(name, input_ids, loss_mask, 0, changes)
    room = min(options.max_new_tokens, limit - len(input_ids))
    if room < needed:
        return Refusal(
            f"too little room for the answer: a prompt of {len(input_ids)} tokens leaves {room} "
            f"(data.max_seq_length={limit}, answer.max_tokens={options.max_new_tokens}), fewer than "
            f"data.min_loss_tokens={needed}"
        )
    return Prompt(name, input_ids, None, room, changes)


def _hash_inputs(files: Sequence[Path], tokenizer: Path, options: TokenizeOptions) -> str:
    tokenizer_files = sorted(f for f in tokenizer.rglob("*") if f.suffix in TOKENIZER_SUFFIXES and f.is_file())
    digest = hashlib.sha256(json.dumps([FORMAT, version("transformers"), asdict(options)], sort_keys=True).encode())
    names = [*short_names(files), *(str(f.relative_to(tokenizer)) for f in tokenizer_files)]
    for name, file in zip(names, [*files, *tokenizer_files], strict=True):
        with file.open("rb") as content:
            digest.update(f"{name}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]
