"""A stand-alone server's replies: held until the store has the request's states, and then saying so.

Lives in SGLang's scheduler process, on its thread. The scheduler goes on with other requests meanwhile.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from torchspec.inference.capture.protocol import Message, captured_key, encode_failed
from torchspec.inference.standalone.config import META_INFO

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_NAP_SECONDS = 0.001


class HoldingStreamer(SchedulerOutputStreamer):
    """SGLang's streamer, for replies of which some must wait."""

    has_additional_customized_info = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._outcomes: dict[str, Future[Message]] = {}
        self._held: dict[str, Req] = {}

    def expect(self, key: str, outcome: Future[Message]) -> None:
        """The request with this key is answered once ``outcome`` is known."""
        self._outcomes[key] = outcome

    def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
        """As in SGLang, but for finished requests whose states are still on their way to the store."""
        self._held |= {req.rid: req for req in reqs if self._must_wait(req)}
        super().stream_output([req for req in reqs if req.rid not in self._held], return_logprob, skip_req)

    def release(self) -> None:
        """Stream the replies that need not wait any longer."""
        for rid, req in list(self._held.items()):
            if not self._must_wait(req):
                del self._held[rid]
                super().stream_output([req], req.return_logprob)

    def wait_for_held(self) -> bool:
        """Whether replies are held. If so, leave the processor to those who store, for a moment."""
        if self._held:
            outcomes = [outcome for outcome in self._outcomes.values() if not outcome.done()]
            wait(outcomes, _NAP_SECONDS, FIRST_COMPLETED)
        return bool(self._held)

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[Any]]:
        """What became of each request's states: a list with one message, or none where that is not asked or known."""
        return {META_INFO: [self._take_messages(req) for req in reqs]}

    def _take_messages(self, req: Req) -> list[Message]:
        key = captured_key(req.rid)
        if key is None or not req.finished():
            return []
        if key not in self._outcomes:
            return [encode_failed(key, "the request ended before all its states were computed")]
        return [self._outcomes.pop(key).result()]

    def _must_wait(self, req: Req) -> bool:
        outcome = self._outcomes.get(captured_key(req.rid) or "")
        return req.finished() and outcome is not None and not outcome.done()
