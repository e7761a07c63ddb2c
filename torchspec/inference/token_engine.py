"""``sglang.Engine`` for token ids in and token ids out. Import it once SGLang's environment variables are set."""

from __future__ import annotations

from multiprocessing import Process
from typing import Any

from sglang.srt.entrypoints.engine import Engine


class TokenEngine(Engine):
    """An engine without SGLang's detokenizer process.

    With ``skip_tokenizer_init`` the scheduler replies to this process by itself. SGLang starts the detokenizer all the
    same: some 10 s of CPU time and half a GiB for a process that is never sent a message.
    """

    def __init__(self, **engine_args: Any):
        super().__init__(**engine_args | {"skip_tokenizer_init": True})

    @classmethod
    def _launch_detokenizer_subprocesses(cls, *_: Any, **__: Any) -> tuple[list[Process], list[str]]:
        return [], []
