"""The capture plugin in a server that a user starts: ``python -m sglang.launch_server``, without a run around it.

server process      refuses what could not be stored ----> scheduler process: computes, captures, stores,
(HTTP)              <--- reply ----------------------------                    holds the reply until then
  meta_info["torchspec"] = the request's metadata | what was stored
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torchspec.inference.capture.protocol import Message, encode_failed
from torchspec.inference.capture.writer import CaptureWriter
from torchspec.inference.sglang_patch import find_sglang
from torchspec.inference.standalone.config import META_INFO, StandaloneConfig, reply_entry, request_metadata
from torchspec.network import LOOPBACK, confine
from torchspec.store.errors import StoreError
from torchspec.store.geometry import shard_suffix

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
    from sglang.srt.server_args import ServerArgs

    from torchspec.shards import ShardFormula
    from torchspec.store.hidden_state_store import Slot

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def register(start: Callable[..., object]) -> None:
    """Hook SGLang, in each of its processes. ``start``: begins to capture, in the scheduler's.

    Raises:
        SystemExit: the environment or SGLang's version will not do. SGLang would log any other exception, and go on.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    try:
        find_sglang()  # SGLang would only log that a hook does not fit another version
        config = StandaloneConfig.from_environment(os.environ)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

    for target, hook, kind in (
        ("sglang.srt.server_args.ServerArgs.check_server_args", partial(_check_server, config), HookType.AFTER),
        (f"{_MANAGER}._validate_one_request", partial(_check_request, config), HookType.AFTER),
        (f"{_MANAGER}.update_request_meta_info", _add_metadata, HookType.AROUND),
        (f"{_SCHEDULER}.get_output_streamer_class", _replace_streamer, HookType.AFTER),
        (f"{_SCHEDULER}.init_output_streamer", partial(_start, config, start), HookType.AFTER),
        (f"{_SCHEDULER}.process_input_requests", _release_replies, HookType.AFTER),
        (f"{_SCHEDULER}.maybe_sleep_on_idle", _sleep, HookType.AROUND),
    ):
        HookRegistry.register(target, hook, kind)


def _check_server(config: StandaloneConfig, _result: None, args: ServerArgs) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig.from_server_args(args)
    dtype = str(model.dtype).removeprefix("torch.")
    layers = args.return_aux_hidden_state_layer_ids
    try:
        config.check_server(layers, not args.disable_radix_cache, args.max_running_requests, model.hidden_size, dtype)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _check_request(
    config: StandaloneConfig, _result: None, _manager: TokenizerManager, request: GenerateReqInput, input_ids: list[int]
) -> None:
    config.check_request(request.rid, len(input_ids), request.sampling_params)


def _add_metadata(
    original: Callable[..., None],
    manager: TokenizerManager,
    meta_info: dict[str, Any],
    state: ReqState,
    info: dict[str, list[Any]],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    """Our entry is one dictionary, not a list that grows with the answer as SGLang's own ones are."""
    messages = info[META_INFO][index]
    others = {name: values for name, values in info.items() if name != META_INFO}
    original(manager, meta_info, state, others, index, finish_reason)
    if messages:
        meta_info[META_INFO] = reply_entry(request_metadata(state.obj.sampling_params), messages[0])


def _replace_streamer(_original: type, _scheduler: Scheduler) -> type:
    from torchspec.inference.standalone.streamer import HoldingStreamer

    return HoldingStreamer


def _start(config: StandaloneConfig, start: Callable[..., object], _result: None, scheduler: Scheduler) -> None:
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().nnodes == 1:  # torch's meeting point, which nobody else needs then
        confine(os.listdir("/proc/self/fd"), LOOPBACK)
    if get_parallel().tp_rank == 0:
        writer = StandaloneWriter(config)
        start(scheduler.tp_worker, writer, scheduler.output_streamer.expect)


class StandaloneWriter(CaptureWriter):
    """Splits all samples alike. Users choose the keys, and may choose one twice: Mooncake would keep the old bytes and
    report success."""

    buffer_knob = "MOONCAKE_LOCAL_BUFFER_SIZE"

    def __init__(self, config: StandaloneConfig):
        super().__init__(config.endpoint, config.buffer_bytes)
        self._sharding = config.sharding

    def _write(self, key: str, buffer: Slot, token_ids: list[int], _: ShardFormula | None) -> Message:
        try:
            taken = self.store.exists(key, (shard_suffix(0, "ids"),))  # rank 0 always has the first token
        except StoreError as error:
            self.store.release(buffer)
            return encode_failed(key, str(error))
        if taken:
            self.store.release(buffer)
            return encode_failed(key, "there is a sample under this key, which must be new for each request")
        return super()._write(key, buffer, token_ids, self._sharding)


def _release_replies(_result: None, scheduler: Scheduler, _requests: list[Any]) -> None:
    """Once in each turn of the scheduler's loop."""
    scheduler.output_streamer.release()


def _sleep(original: Callable[[Scheduler], None], scheduler: Scheduler) -> None:
    """An idle scheduler may sleep for a second, which a held reply should not."""
    if not scheduler.output_streamer.wait_for_held():
        original(scheduler)
