"""The page's server: a run's folder over HTTP on loopback, the page itself, Prometheus, and two controls.

All users of a machine share its loopback. Without a token it gives them figures for Prometheus and an empty page; what
``/api`` tells, config, names and texts among it, is for who has the token of a run that it serves (``ui_token`` in the
run's folder, readable by its owner alone), and controls for who has that of the run itself. Requests whose Host is not
a name of this machine are refused, so a page of a stranger's that resolves its own name to 127.0.0.1 reads nothing; so
are controls that come from another origin. The server keeps no state: a restart, of it or of what it shows, costs
nothing.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from torchspec.files import ensure_secret
from torchspec.monitor import views
from torchspec.monitor.prometheus import CONTENT_TYPE, exposition
from torchspec.monitor.snapshot import read_latest
from torchspec.run_folder import RunFolder

HOST, DEFAULT_PORT = "127.0.0.1", 8790
OWN_NAME = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
"""As a request's Host; the port is another where somebody has forwarded ours."""
PAGE = Path(__file__).with_name("page")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_WORKERS = 4096
SCRAPE_SECONDS = 5.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Query = Mapping[str, str]


class Controls(Protocol):
    """What a page may do to a run. Both raise ValueError, with the reason, where it cannot be done."""

    def scale_inference(self, workers: int | Literal["auto"]) -> None: ...
    def stop(self, reason: str) -> None: ...


class PageServer:
    """Serves runs.

    Args:
        folders: the runs' folders, the one of interest first.
        controls: what acts on each of them.
        port: to listen on; None for :data:`DEFAULT_PORT`, or a free one where that is taken.

    Raises:
        ValueError: ``port`` cannot be had.
    """

    def __init__(self, folders: Sequence[Path], controls: Callable[[Path], Controls], port: int | None = None):
        self._folders, self._controls = [folder.resolve() for folder in folders], controls
        self._wanted = port
        self.port = 0
        """Where it listens, once :meth:`start` is done."""

    async def start(self) -> web.AppRunner:
        """Listen. The caller cleans the runner up."""
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        candidates = [self._wanted] if self._wanted is not None else [DEFAULT_PORT, 0]
        for port in candidates:
            try:
                await web.TCPSite(runner, HOST, port).start()
                break
            except OSError as error:
                if port == candidates[-1]:
                    await runner.cleanup()
                    raise ValueError(
                        f"monitor.ui_port={port} cannot be used on {HOST} ({error.strerror}); choose another port, or "
                        "leave it out to get a free one"
                    ) from error
        self.port = runner.addresses[0][1]
        return runner

    @property
    def url(self) -> str:
        """The page, without the token."""
        return f"http://{HOST}:{self.port}/"

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[_guard], client_max_size=4096)
        application.on_response_prepare.append(_add_headers)
        application.add_subapp("/api", self._api())
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/metrics/store", self._store_metrics)
        application.router.add_get("/", _page)
        application.router.add_static("/", PAGE)
        return application

    def _api(self) -> web.Application:
        """What is for who has a token."""
        api = web.Application(middlewares=[self._with_token])
        read: dict[str, Callable[[Path, Query], Any]] = {
            "run": lambda run, _: views.run_view(run),
            "events": lambda run, query: views.events_view(run, _number(query, "since")),
            "samples": lambda run, _: views.samples_view(run),
            "update": lambda run, query: views.update_view(run, _since(query)),
        } | {name: _course(view) for name, view in views.COURSES.items()}
        for name, view in read.items():
            api.router.add_get(f"/{name}", self._reader(view))
        api.router.add_get("/runs", self._runs)
        api.router.add_get("/sample/{sample}", self._sample)
        api.router.add_post("/scale", self._scale)
        api.router.add_post("/stop", self._stop)
        return api

    @web.middleware
    async def _with_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        _require_token(request, self._folders)
        return await handler(request)

    # ---- reading ----

    def _reader(self, view: Callable[[Path, Query], Any]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            return web.json_response(await asyncio.to_thread(view, self._folder(request), request.query))

        return handle

    async def _runs(self, _request: web.Request) -> web.Response:
        runs = [
            {"index": i, "name": folder.name, "folder": str(folder), "live": RunFolder(folder).is_live()}
            for i, folder in enumerate(self._folders)
        ]
        return web.json_response(runs)

    async def _sample(self, request: web.Request) -> web.Response:
        sample, folder = request.match_info["sample"], self._folder(request)
        try:
            return web.json_response(await asyncio.to_thread(views.sample_view, folder, sample))
        except KeyError:
            raise _refusal(web.HTTPNotFound, f"{sample} is not among the samples that were followed") from None

    async def _metrics(self, request: web.Request) -> web.Response:
        folder = self._folder(request)
        text = await asyncio.to_thread(
            lambda: exposition(folder.name, read_latest(folder), RunFolder(folder).is_live())
        )
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def _store_metrics(self, request: web.Request) -> web.Response:
        """What the store's master says, under an address that stays the same from run to run."""
        folder = RunFolder(self._folder(request))
        try:
            address = folder.read_handle()["store_metrics"]
            patience = ClientTimeout(SCRAPE_SECONDS)
            async with ClientSession(timeout=patience) as session, session.get(f"http://{address}/metrics") as answer:
                return web.Response(body=await answer.read(), headers={"Content-Type": CONTENT_TYPE})
        except (OSError, KeyError, ClientError, TimeoutError):
            raise _refusal(web.HTTPServiceUnavailable, "the run's store does not answer") from None

    # ---- controls ----

    async def _scale(self, request: web.Request) -> web.Response:
        folder, body = await self._controlled(request)
        workers = body.get("workers")
        if workers != "auto" and (type(workers) is not int or not 1 <= workers <= MAX_WORKERS):
            reason = f"workers is {workers!r}, but must be a whole number from 1 to {MAX_WORKERS}, or auto"
            raise _refusal(web.HTTPBadRequest, reason)
        await self._act(folder, lambda controls: controls.scale_inference(workers))
        size = "is sized automatically" if workers == "auto" else f"becomes {workers}"
        return web.json_response({"message": f"the inference pool {size}"})

    async def _stop(self, request: web.Request) -> web.Response:
        folder, _ = await self._controlled(request)
        await self._act(folder, lambda controls: controls.stop("asked from the page"))
        return web.json_response({"message": "the run stops after its current step and saves a checkpoint"})

    async def _act(self, folder: Path, action: Callable[[Controls], None]) -> None:
        if not RunFolder(folder).is_live():
            raise _refusal(web.HTTPConflict, f"{folder.name} is not running")
        try:
            await asyncio.to_thread(lambda: action(self._controls(folder)))
        except ValueError as error:
            raise _refusal(web.HTTPConflict, str(error)) from None

    async def _controlled(self, request: web.Request) -> tuple[Path, dict[str, Any]]:
        """The run and the request's body, if it may control the run."""
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise _refusal(web.HTTPForbidden, "controls answer to their own page alone")
        folder = self._folder(request)
        _require_token(request, [folder])
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise _refusal(web.HTTPBadRequest, "the body must be a JSON object")
        return folder, body

    def _folder(self, request: web.Request) -> Path:
        index = request.query.get("run", "0")
        folders = {str(number): folder for number, folder in enumerate(self._folders)}
        if index not in folders:
            raise _refusal(web.HTTPNotFound, f"run={index}: there are {len(folders)} runs here")
        return folders[index]


def ensure_token(run_dir: Path) -> str:
    """The run's token, made the first time; only its owner can read it. Raises ValueError: that is somebody else."""
    try:
        return ensure_secret(RunFolder(run_dir).token)
    except PermissionError:
        raise ValueError(
            f"the page of {run_dir} is its owner's to serve (ui_token is not yours); torchspec status and top show it"
        ) from None


def token_hint(run_dir: Path) -> str:
    """What follows the printed address of the page: the token on a terminal; elsewhere, as in a log, only its file."""
    path = RunFolder(run_dir).token
    return f"#token={path.read_text()}" if sys.stdout.isatty() else f" (its token: {path})"


class ServerThread:
    """A :class:`PageServer` on a thread of its own, ready when the constructor returns."""

    def __init__(self, server: PageServer):
        self.server = server
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="page", daemon=True)
        self._thread.start()
        self._started.result()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        try:
            runner = await self.server.start()
        except Exception as error:  # for the constructor to raise
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        await self._end.wait()
        await runner.cleanup()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Names of this machine only."""
    if not OWN_NAME.fullmatch(request.host):
        raise _refusal(web.HTTPForbidden, f"this server is not {request.host}")
    return await handler(request)


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


async def _page(_request: web.Request) -> web.FileResponse:
    return web.FileResponse(PAGE / "index.html")


def _refusal(kind: type[web.HTTPError], reason: str) -> web.HTTPError:
    return kind(text=json.dumps({"error": reason}), content_type="application/json")


def _require_token(request: web.Request, folders: Sequence[Path]) -> None:
    """Raises HTTPUnauthorized: the request does not bring the token of any of these runs."""
    given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="surrogateescape")
    tokens = [path.read_bytes() for folder in folders if (path := RunFolder(folder).token).exists()]
    if not any(token and secrets.compare_digest(given, token) for token in tokens):
        reason = "the token is missing or wrong; it is in the file ui_token in the run's folder, and goes into Control"
        raise _refusal(web.HTTPUnauthorized, reason)


def _course(view: Callable[[Path, float | None, int | None], Any]) -> Callable[[Path, Query], Any]:
    """A view of what is new and thin enough, with its arguments from a query."""
    return lambda run, query: view(run, _number(query, "since"), _count(query, "points"))


def _number(query: Query, name: str) -> float | None:
    if name not in query:
        return None
    try:
        number = float(query[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _refusal(web.HTTPBadRequest, f"{name}={query[name]} is not a number")
    return number


def _count(query: Query, name: str) -> int | None:
    number = _number(query, name)
    return None if number is None else max(2, int(number))


def _since(query: Query) -> dict[str, float]:
    names = [name for name in ("history", "entities", "steps", "events") if name in query]
    return {name: _number(query, name) or 0.0 for name in names}
