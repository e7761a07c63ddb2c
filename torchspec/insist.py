"""Calls of an actor that may be out of reach for a while: its connection drops, or it is being started anew.

Whether a call that was lost had been carried out, nobody knows. It is made again, so to whoever is called, a call that
comes twice is one call.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

_PAUSE_SECONDS = 0.5


async def insist(method: Any, *args: Any) -> Any:
    """What the actor's ``method`` returns, asked again and again while the actor is out of reach.

    Raises:
        RayActorError: there is no such actor any more.
    """
    while True:
        try:
            return await method.remote(*args)
        except ray.exceptions.ActorUnavailableError:
            await asyncio.sleep(_PAUSE_SECONDS)


def insist_and_wait(method: Any, *args: Any) -> Any:
    """:func:`insist`, for who has no event loop."""
    return asyncio.run(insist(method, *args))
