"""The page's server on real sockets: what it serves, whom it refuses, what its controls do."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from torchspec.monitor import views
from torchspec.monitor.server import DEFAULT_PORT, PageServer, ServerThread, ensure_token, token_hint
from torchspec.run_folder import this_process


@dataclass
class Recorded:
    """Controls that only take note."""

    actions: list[Any] = field(default_factory=list)
    failure: str | None = None

    def scale_inference(self, workers: int | Literal["auto"]) -> None:
        self._act(workers)

    def stop(self, reason: str) -> None:
        self._act(reason)

    def _act(self, action: Any) -> None:
        if self.failure is not None:
            raise ValueError(self.failure)
        self.actions.append(action)


@dataclass
class Client:
    folder: Path
    server: PageServer
    controls: Recorded
    token: str

    def read(self, path: str) -> tuple[int, Any]:
        """As who has the token."""
        status, answer, _ = self.ask(path, Authorization=f"Bearer {self.token}")
        return status, answer

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        sent = body if isinstance(body, str | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, sent, headers)
        answer = connection.getresponse()
        data, kind = answer.read(), answer.headers["Content-Type"]
        connection.close()
        return answer.status, json.loads(data) if "json" in kind else data.decode(), dict(answer.headers)

    def control(self, path: str, body: Any, token: str | None = None, **headers: str) -> tuple[int, Any]:
        status, answer, _ = self.ask(path, body, Authorization=f"Bearer {token or self.token}", **headers)
        return status, answer


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("server")
    runs = []
    for name, scenario in (("one", "store-bound"), ("two", "balanced")):
        runs.append(SimulatedRun(folder / name, Simulation(SCENARIOS[scenario])))
        runs[-1].follow(90)
    (folder / "one" / "handle.json").write_text(json.dumps(this_process()))
    controls = Recorded()
    token = ensure_token(folder / "one")
    thread = ServerThread(PageServer([folder / "one", folder / "two"], lambda _: controls, 0))
    yield Client(folder, thread.server, controls, token)
    thread.close()


def test_every_view_is_served_for_each_run(client: Client) -> None:
    one, two = client.folder / "one", client.folder / "two"
    assert [(r["name"], r["live"]) for r in client.read("/api/runs")[1]] == [("one", True), ("two", False)]
    assert client.read("/api/run")[1] == json.loads(json.dumps(views.run_view(one)))
    assert client.read("/api/run?run=1")[1]["name"] == "two"
    assert client.read("/api/history?points=20&run=1")[1] == views.history_view(two, points=20)
    assert client.read("/api/entities")[1] == views.entities_view(one)
    assert client.read("/api/steps?since=1700000080")[1] == views.steps_view(one, 1700000080.0)
    assert client.read("/api/events")[1] == views.events_view(one)
    sample = client.read("/api/samples")[1]["samples"][0]["sample"]
    assert client.read(f"/api/sample/{sample}")[1] == json.loads(json.dumps(views.sample_view(one, sample)))
    assert client.read("/api/sample/e9p9")[0] == 404
    update = client.read("/api/update?history=1700000085&events=0")[1]
    assert len(update["history"]["time"]) == 5 and update["events"] and "steps" not in update
    assert update["verdict"]["side"] == "store"


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer x", "Bearer \xe9", "Bearer \xff\xfe", "Basic {token}"])
def test_config_names_and_reasons_are_for_who_has_the_token(client: Client, given: str) -> None:
    views_of_a_run = ("runs", "run", "events", "samples", "sample/e0p0", "update?events=0", *views.COURSES)
    for view in (*views_of_a_run, "absent"):
        headers = {"Authorization": given.format(token=client.token)} if given else {}
        status, answer, _ = client.ask(f"/api/{view}", **headers)
        assert status == 401 and list(answer) == ["error"] and str(client.folder) not in answer["error"], view
    assert client.ask("/metrics")[0] == client.ask("/")[0] == 200


def test_who_has_the_token_of_one_run_reads_the_other_beside_it_and_does_not_control_it(client: Client) -> None:
    token = ensure_token(client.folder / "two")
    for index, name in enumerate(("one", "two")):
        _, answer, _ = client.ask(f"/api/run?run={index}", Authorization=f"Bearer {token}")
        assert answer["name"] == name
    assert client.control("/api/stop", {}, token=token)[0] == 401 and client.controls.actions == []
    (client.folder / "two" / "ui_token").unlink()


def test_metrics_are_served_and_the_stores_are_refused_without_a_store(client: Client) -> None:
    status, text, headers = client.ask("/metrics?run=1")
    assert status == 200 and 'torchspec_step{run="two"}' in text and headers["Content-Type"].startswith("text/plain")
    assert client.ask("/metrics/store")[0] == 503


def test_the_page_may_load_nothing_from_elsewhere(client: Client) -> None:
    status, text, headers = client.ask("/")
    assert status == 200 and "<html" in text
    for path in ("/", "/api/runs", "/api/absent", "/absent"):
        _, _, headers = client.ask(path)
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/run?run=2", 404),
        ("/api/run?run=x", 404),
        ("/api/run?run=-1", 404),
        ("/api/run?run=01", 404),
        (f"/api/run?run={'9' * 5000}", 404),
        ("/api/history?since=x", 400),
        ("/api/history?points=nan", 400),
        ("/api/steps?points=inf", 400),
        ("/api/steps?points=1e999", 400),
        (f"/api/steps?points={'9' * 5000}", 400),
        ("/api/entities?since=-inf", 400),
        ("/api/events?since=nan", 400),
        ("/api/update?history=nan", 400),
        ("/api/steps?points=1e308", 200),
        ("/api/steps?points=-1", 200),
        ("/api/sample/e9p9", 404),
        ("/api/sample/%00%1b%5b2J", 404),
        ("/api/absent", 404),
        ("/../server.py", 404),
        ("/%2e%2e/server.py", 404),
        ("/absent.js", 404),
    ],
)
def test_what_is_not_there_is_said_so(client: Client, path: str, status: int) -> None:
    assert client.read(path)[0] == status


def test_a_strangers_page_reads_nothing(client: Client) -> None:
    """DNS rebinding: a name of the attacker's that resolves to loopback."""
    secret = {"Authorization": f"Bearer {client.token}"}
    strange = ("evil.example", f"evil.example:{client.server.port}", "127.0.0.1.evil.example", "127.0.0.1@evil.example")
    malformed = ("[", "[::1", "[evil", "]", "127.0.0.1:", "127.0.0.1:x", "localhost:1:2", "[::1]evil", "\xe9", "")
    for host in (*strange, *malformed):
        assert client.ask("/api/run", Host=host, **secret)[0] == 403, host
        assert client.ask("/metrics", Host=host)[0] == 403
    for host in (f"localhost:{client.server.port}", "LOCALHOST", "127.0.0.1:9", "[::1]:8790"):
        assert client.ask("/api/runs", Host=host, **secret)[0] == 200, host


def test_controls_need_the_token_and_their_own_page(client: Client) -> None:
    port = client.server.port
    assert client.ask("/api/stop", {})[0] == 401
    assert client.control("/api/stop", {}, token=client.token + "x")[0] == 401
    assert client.control("/api/stop", {}, token=client.token[:-1])[0] == 401
    for origin in ("http://evil.example", f"http://127.0.0.1:{port + 1}", "null", "http://[", "", "\xe9"):
        assert client.control("/api/stop", {}, Origin=origin)[0] == 403, origin
    assert client.control("/api/stop?run=1", {})[0] == 401, "a run without a token cannot be controlled"
    assert client.read("/api/stop")[0] == 405, "a link or an image cannot stop a run"
    assert client.controls.actions == []


def test_controls_act_on_the_run(client: Client) -> None:
    origin = f"http://127.0.0.1:{client.server.port}"
    assert client.control("/api/scale", {"workers": 3}, Origin=origin)[0] == 200
    status, answer = client.control("/api/scale", {"workers": "auto"})
    assert status == 200 and "automatically" in answer["message"]
    assert client.control("/api/stop", {})[0] == 200
    assert client.controls.actions == [3, "auto", "asked from the page"]
    for workers in (0, -1, 2.5, "3", "Auto", None, True, 10**9):
        status, answer = client.control("/api/scale", {"workers": workers})
        assert status == 400 and "workers" in answer["error"]
    for body in ("[]", "{", "", "[" * 4000, "\xff", '{"workers": ' + "9" * 4000 + "}", "x" * 5000):
        assert client.control("/api/scale", body)[0] == (413 if len(body) > 4096 else 400), body
    client.controls.failure = "there is no room for 9"
    assert client.control("/api/scale", {"workers": 9}) == (409, {"error": "there is no room for 9"})
    client.controls.failure = None


def test_a_run_that_has_ended_cannot_be_controlled(client: Client) -> None:
    token = ensure_token(client.folder / "two")
    status, answer = client.control("/api/stop?run=1", {}, token=token)
    assert status == 409 and "not running" in answer["error"]
    (client.folder / "two" / "ui_token").unlink()


def test_the_token_is_the_owners_and_stays_the_same(tmp_path: Path) -> None:
    token = ensure_token(tmp_path)
    assert len(token) >= 32 and ensure_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / "ui_token").stat().st_mode) == 0o600


def test_the_page_of_somebody_elses_run_is_refused_in_one_line(tmp_path: Path) -> None:
    ensure_token(tmp_path)
    user = os.geteuid()
    tmp_path.chmod(0)
    try:
        if user == 0:  # whom nothing is closed to
            os.seteuid(65534)
        with pytest.raises(ValueError, match=r"is its owner's to serve \(ui_token is not yours\)"):
            ensure_token(tmp_path)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_the_token_is_printed_on_a_terminal_and_in_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = ensure_token(tmp_path)
    assert token_hint(tmp_path) == f" (its token: {tmp_path / 'ui_token'})"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert token_hint(tmp_path) == f"#token={token}"


def test_a_taken_port_is_refused_when_asked_for_and_gone_around_when_not(client: Client) -> None:
    taken = client.server.port
    with pytest.raises(ValueError, match=rf"monitor\.ui_port={taken} cannot be used"):
        ServerThread(PageServer([client.folder / "one"], lambda _: client.controls, taken))
    with socket.socket() as blocker:
        blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # over what closed connections leave behind
        try:
            blocker.bind(("127.0.0.1", DEFAULT_PORT))
            blocker.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        thread = ServerThread(PageServer([client.folder / "one"], lambda _: client.controls))
        assert thread.server.port not in (0, DEFAULT_PORT)
        thread.close()


def test_it_listens_on_loopback_alone_and_ends_without_a_trace(client: Client) -> None:
    thread = ServerThread(PageServer([client.folder / "one"], lambda _: client.controls, 0))
    port = thread.server.port
    listening = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
    thread.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
