"""The process around one SGLang engine: reads ``job.json``, answers it, writes ``replies.json``.

    python -m torchspec.evaluation.engine_process FOLDER

``serving.py`` starts it and says why it is a process of its own.

It asks the engine first whether it really holds the draft, tensor by tensor: SGLang passes over tensors that it has no
place for, and leaves parameters that found no tensor at whatever they were initialised to. Its own weight checker
hashes what each runner holds; here the same hashes are made from the file, under the names and in the shapes it uses.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sglang.version import __version__ as sglang_version
from torch import Tensor

from torchspec.drafts.export import WEIGHTS, read_spec
from torchspec.drafts.spec import DraftSpec
from torchspec.evaluation.serving import START_SECONDS, Job, Reply, Served
from torchspec.files import write_atomically
from torchspec.inference.sglang_process import end_engine, start_token_engine

_WARM_UP_TOKENS = 8
_HEAD, _VOCAB_MULTIPLE = "lm_head.weight", 64
"""SGLang pads the rows of a head to a multiple of this, with zeros."""


def answer(job: Job, folder: Path) -> Served:
    """Start an engine, which keeps its files in ``folder``, and let it answer all prompts.

    Raises:
        ValueError: the engine does not hold all of the draft.
    """
    signal.alarm(START_SECONDS)  # ends this process, and the janitor then the engine's
    engine = start_token_engine(folder, **job.sglang_args())
    signal.alarm(0)
    try:
        if job.draft is not None:
            require_loaded(engine, Path(job.draft), getattr(torch, job.dtype))
        return _generate(engine, job)
    finally:
        end_engine(engine)


def _generate(engine: Any, job: Job) -> Served:
    sampling = {"temperature": 0.0, "max_new_tokens": job.max_tokens, "stop_token_ids": job.end_token_ids}
    engine.generate(
        input_ids=job.prompts[: job.concurrency], sampling_params=sampling | {"max_new_tokens": _WARM_UP_TOKENS}
    )
    start = time.perf_counter()
    outputs = engine.generate(input_ids=job.prompts, sampling_params=sampling)
    seconds = time.perf_counter() - start
    replies = [Reply(o["output_ids"], o["meta_info"].get("spec_correct_drafts_histogram", [])) for o in outputs]
    return Served(replies, seconds, sglang_version)


def require_loaded(engine: Any, draft: Path, dtype: torch.dtype) -> None:
    """Check every parameter of the engine's draft runner against the folder (one tensor-parallel rank only).

    Raises:
        ValueError: naming the parameters that are not what the file says.
    """
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    request = engine.tokenizer_manager.check_weights(CheckWeightsReqInput(action="checksum", selector="all"), None)
    success, message, ranks, _ = engine.loop.run_until_complete(request)
    if not success:
        raise ValueError(f"SGLang could not hash its weights: {message}")
    held = ranks[0]["checksums"]
    expected = draft_checksums(read_spec(draft), load_file(draft / WEIGHTS), dtype)
    found = {name.removeprefix("draft."): value for name, value in held.items() if name.startswith("draft.")}
    targets = {name for name, value in found.items() if name not in expected and value == held.get(name)}
    names = (expected.keys() | found.keys()) - targets
    wrong = sorted(name for name in names if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"SGLang did not load all of {draft}: {', '.join(wrong)} differ from the file")


def draft_checksums(spec: DraftSpec, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """SGLang's name and hash of every parameter whose tensors an exported folder holds."""
    from sglang.srt.managers.mm_utils import tensor_hash

    hashes = {}
    for name, parts in spec.served_as().items():
        if not tensors.keys() >= set(parts):
            continue
        weight = torch.cat([tensors[part].to(dtype) for part in parts])
        if name == _HEAD:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % _VOCAB_MULTIPLE))
        hashes[name] = f"{tensor_hash(weight):016x}"
    return hashes


def main() -> None:
    folder = Path(sys.argv[1])
    served = answer(Job(**json.loads((folder / "job.json").read_text())), folder)
    write_atomically(folder / "replies.json", lambda file: file.write(json.dumps(asdict(served)).encode()))


if __name__ == "__main__":  # SGLang's own processes import this module too
    main()
