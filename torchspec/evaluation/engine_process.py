"""The process around one SGLang engine: reads ``job.json``, answers it, writes ``replies.json``.

    python -m torchspec.evaluation.engine_process FOLDER

``serving.py`` starts it and says why it is a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sglang.version import __version__ as sglang_version

from torchspec.evaluation.loaded_weights import require_loaded
from torchspec.evaluation.serving import Job, Reply
from torchspec.inference.sglang_process import end_engine, start_token_engine

_WARM_UP_TOKENS = 8


def answer(job: Job) -> tuple[list[Reply], float]:
    """All replies, and the seconds they took.

    Raises:
        ValueError: the engine does not hold all of the draft.
    """
    engine = start_token_engine(**job.sglang_args())
    try:
        if job.draft is not None:
            require_loaded(engine, Path(job.draft), getattr(torch, job.dtype))
        return _generate(engine, job)
    finally:
        end_engine(engine)


def _generate(engine: Any, job: Job) -> tuple[list[Reply], float]:
    sampling = {"temperature": 0.0, "max_new_tokens": job.max_tokens}
    engine.generate(
        input_ids=job.prompts[: job.concurrency], sampling_params=sampling | {"max_new_tokens": _WARM_UP_TOKENS}
    )
    start = time.perf_counter()
    outputs = engine.generate(input_ids=job.prompts, sampling_params=sampling)
    seconds = time.perf_counter() - start
    return [Reply(o["output_ids"], o["meta_info"].get("spec_correct_drafts_histogram", [])) for o in outputs], seconds


def main() -> None:
    folder = Path(sys.argv[1])
    replies, seconds = answer(Job(**json.loads((folder / "job.json").read_text())))
    served = {"replies": [asdict(r) for r in replies], "seconds": seconds, "sglang_version": sglang_version}
    (folder / "replies.part").write_text(json.dumps(served))
    os.rename(folder / "replies.part", folder / "replies.json")


if __name__ == "__main__":  # SGLang's own processes import this module too
    main()
