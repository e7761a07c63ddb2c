"""Calls of an actor that may be out of reach for a while: its connection drops, or it is being started anew.

Whether a call that was lost had been carried out, nobody knows. It is made again, so to whoever is called, a call that
comes twice is one call.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

_PAUSE_SECONDS = 0.5
_DEATHS = 10
"""Calls in a row that a death ends: by then, whoever is started anew is out of reach, or there."""


async def insist(method: Any, *args: Any) -> Any:
    """What the actor's ``method`` returns, asked again and again while the actor is out of reach.

    A call that was under way when the actor's process died fails as one to an actor that is no more does, though
    another process is being started (Ray 2.60).

    Raises:
        RayActorError: there is no such actor any more.
    """
    deaths = 0
    while True:
        try:
            return await method.remote(*args)
        except ray.exceptions.ActorUnavailableError:
            deaths = 0
        except ray.exceptions.ActorDiedError as error:
            deaths += 1
            if error.actor_init_failed or deaths == _DEATHS:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


def insist_and_wait(method: Any, *args: Any) -> Any:
    """:func:`insist`, for who has no event loop."""
    return asyncio.run(insist(method, *args))
