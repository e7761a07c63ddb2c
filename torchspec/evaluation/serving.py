"""Serves a batch of prompts in a SGLang engine of its own, which is gone afterwards whatever happens.

    evaluation (this process)              engine process, its own session            SGLang's processes
    job.json --------------------------->  token engine, warm-up, generate    <-->  scheduler
    replies.json <-----------------------  tokens, histograms, seconds
    janitor: kills what is left, cleans /dev/shm - also after Ctrl-C or kill -9 of this process

The engine runs in a process of its own because SGLang ends by killing all children of its process, takes its thread
counts from the environment it is born in, and writes to the terminal. In its own session, Ctrl-C reaches this process
alone, and the janitor ends the engine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchspec.processes.janitor import MARK, Janitor

START_SECONDS = 900
"""What an engine has to start up, its model loaded, before it is taken for hung."""
_LOG_LINES = 15
_POOL_SLACK = 64
"""KV slots of a request beyond its own tokens: drafts in flight, and rounding."""


class ServingError(RuntimeError):
    """The engine did not start, or did not answer. Says what the engine's log ended with."""


@dataclass(frozen=True, slots=True)
class Job:
    """One engine, started for one batch of prompts, decoding greedily."""

    target: str
    prompts: list[list[int]]
    """Token ids."""
    max_tokens: int
    dtype: str
    device: str
    threads: int
    concurrency: int
    """Requests that are decoded together."""
    draft: str | None = None
    """Folder of an exported draft; without one, the engine decodes plainly."""
    speculation: dict[str, Any] = field(default_factory=dict)
    """What makes the engine draft with it (``DraftSpec.server_args``)."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """More arguments of ``sglang.Engine``."""
    end_token_ids: list[int] = field(default_factory=list)
    """Tokens that end an answer, beside those of the target's configs."""
    trust_remote_code: bool = False

    def sglang_args(self) -> dict[str, Any]:
        """Arguments of ``sglang.Engine``. No prefix cache: the warm-up must not save the measured run its prefill."""
        longest = max(map(len, self.prompts)) + self.max_tokens + _POOL_SLACK
        args: dict[str, Any] = {
            "model_path": self.target,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "device": self.device,
            "disable_radix_cache": True,
            "enable_multimodal": False,
            "max_running_requests": self.concurrency,
            "log_level": "warning",
        }
        if self.device == "cpu":
            args |= {
                "attention_backend": "torch_native",
                "sampling_backend": "pytorch",
                "disable_cuda_graph": True,
                "mem_fraction_static": 0.8,  # a bound only: the pool is as large as the next line says
                "max_total_tokens": self.concurrency * longest,
            }
        if self.draft is not None:
            args |= {"speculative_draft_model_path": self.draft, **self.speculation}
        return args | self.engine_args

    def environment(self) -> dict[str, str]:
        """What the engine's processes must find in their environment.

        On a CPU, SGLang compiles two small functions on first use, which takes longer than they ever save.
        """
        env = {"OMP_NUM_THREADS": str(self.threads)}
        if self.device == "cpu":
            env |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        if self.draft is not None:  # published drafts often name a shorter context than their target's
            env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        return env


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    output_ids: list[int]
    histogram: list[int]
    """``histogram[k]``: verify steps in which ``k`` drafts were right. Empty without a draft."""


@dataclass(frozen=True, slots=True)
class Served:
    """All answers, in the order of the prompts."""

    replies: list[Reply]
    seconds: float
    """From the first prompt in to the last answer out, engine warm."""
    sglang_version: str

    @property
    def output_tokens(self) -> int:
        return sum(len(reply.output_ids) for reply in self.replies)


def serve(job: Job) -> Served:
    """Start an engine, answer the job's prompts, and leave nothing of it behind.

    Raises:
        ServingError: the engine failed, or does not hold all of the draft.
    """
    temp = Path(tempfile.mkdtemp(prefix="torchspec-"))
    mark = uuid.uuid4().hex
    janitor = Janitor(mark, temp)
    try:
        (temp / "job.json").write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "torchspec.evaluation.engine_process", str(temp)]
        with (temp / "log").open("wb") as log:
            code = subprocess.run(
                command,
                env=os.environ | job.environment() | {MARK: mark, "TMPDIR": str(temp)},  # SGLang leaves its sockets
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ).returncode
        if code == -signal.SIGALRM:
            raise ServingError(f"the SGLang engine had not started after {START_SECONDS} s")
        if not (temp / "replies.json").exists():
            tail = "\n".join((temp / "log").read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise ServingError(f"the SGLang engine ended with exit code {code} before it had answered:\n{tail}")
        served = json.loads((temp / "replies.json").read_text())
        served["replies"] = [Reply(**reply) for reply in served["replies"]]
        return Served(**served)
    finally:
        janitor.close()
