"""A run from start to end: prepare, start the actors, watch them, stop them, clean up.

prepare        everything that can be wrong with what the user asked for, before anything starts
launch         janitor -> Ray, and what its nodes have -> store master -> store node -> controller -> inference workers
train          once the draft's vocabulary is known: trainer ranks; then watch everybody
finish         workers leave, files are closed, the cluster goes, the janitor sweeps
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torchspec.config.load import save_config
from torchspec.config.schema import Config
from torchspec.contracts import RunStatus, StepReport
from torchspec.data.conversations import printable
from torchspec.driver.actors import ActorFactory
from torchspec.driver.cluster import Cluster, namespace, start_cluster
from torchspec.driver.console import Interrupts, View
from torchspec.driver.controller_client import ControllerClient
from torchspec.driver.nodes import check_nodes
from torchspec.driver.placement import Placement, check_pools
from torchspec.driver.prepare import Prepared, prepare
from torchspec.driver.remote import PageControls
from torchspec.driver.session import Session
from torchspec.driver.store import StoreSupervisor
from torchspec.driver.supervise import RunFailed
from torchspec.files import write_atomically
from torchspec.knobs import found
from torchspec.monitor.curves import draw_curves
from torchspec.monitor.record.recorder import EventLog
from torchspec.monitor.server import PageServer, ServerThread, ensure_token, token_hint
from torchspec.monitor.trackers import open_trackers
from torchspec.processes.janitor import MARK, Janitor
from torchspec.run_folder import RunFolder, this_process
from torchspec.store.errors import StoreUnavailable
from torchspec.store.master import MooncakeMaster
from torchspec.training.checkpoint import point

_DISK_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
"""What a file system has to say; any other OSError is a mistake of ours."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    run_dir: Path
    steps: int
    samples: int
    rejected: int
    seconds: float
    stopped: bool
    checkpoint: Path | None
    export: Path | None
    """Of the last checkpoint's draft."""
    last_step: StepReport | None
    last_heldout: StepReport | None
    export_failure: str = ""
    """Why there is no export."""


def train(config: Config, *, resume: bool, view: View, start: str = "latest") -> RunSummary:
    """Run ``config`` to its end, or to a stop; a resume from the checkpoint ``start``.

    Raises:
        ValueError: what the user asked for cannot work; nothing was started.
        RunFailed: the run broke; the message says why.
        KeyboardInterrupt: interrupted twice.
    """
    started = time.monotonic()
    try:
        prepared = prepare(config, resume, view.message, start)
    except OSError as error:
        raise ValueError(f"{_disk_fault(error)} (run.dir is {config.run_dir})") from None
    failure: RunFailed | None = None
    try:
        with _launch(prepared, view) as session:
            try:
                status, stopped = session.run()
            except RunFailed as error:
                failure = _failed(prepared.folder, str(error))
                raise failure from None
        return _summary(prepared, status, stopped, time.monotonic() - started)
    except OSError as error:
        raise failure or _failed(prepared.folder, _disk_fault(error)) from None  # what came first is the reason


def _failed(folder: RunFolder, reason: str) -> RunFailed:
    """``reason`` is written down, if the disk has room for it, and told with how to go on."""
    reason = printable(reason)
    with suppress(OSError):
        EventLog(folder.path).write(time.time(), "failed", reason)
    next_step = f"continue with: torchspec resume {folder.path}" if folder.exists() else "start it again"
    return RunFailed(f"{reason}; {next_step}")


def _disk_fault(error: OSError) -> str:
    """One line about a file that cannot be used. Raises ``error`` itself if it is about anything else."""
    if error.errno not in _DISK_FAULTS:
        raise error
    return f"cannot use {error.filename or 'a file'}: {error.strerror}"


@contextmanager
def _launch(prepared: Prepared, view: View) -> Iterator[Session]:
    """Everything that must be taken down again, in the reverse order, whatever happens."""
    config, folder = prepared.config, prepared.folder
    with ExitStack() as stack:
        stack.enter_context(folder.hold())  # a run has one driver
        view.log_to(folder.log("driver"))
        if not folder.exists():
            folder.draft_vocab.unlink(missing_ok=True)  # of a launch that failed early, maybe on other data
        if prepared.go_back_to is not None:
            point(folder.checkpoints, "latest", prepared.go_back_to)
        mark, temp_dir = prepared.mark, Path(tempfile.mkdtemp(prefix="torchspec-"))
        janitor = Janitor(mark, temp_dir)
        stack.callback(janitor.close)
        os.environ[MARK] = mark
        stack.callback(os.environ.pop, MARK)
        interrupts = stack.enter_context(Interrupts(view.message))
        view.message("starting Ray, the store and the controller")
        after_cluster = stack.enter_context(ExitStack())
        cluster = stack.enter_context(start_cluster(config, prepared.plan, temp_dir))
        interrupts.install()
        if config.cluster.address is not None:
            _check_cluster(prepared, cluster)
        master = _start_master(config, cluster)
        after_cluster.callback(master.stop)  # a store node that ends without its master waits for it
        (temp_dir / "actors").mkdir()
        placement = Placement(cluster, config.cluster)
        actors = ActorFactory(prepared, master.endpoint, placement, temp_dir / "actors")
        recovery = config.recovery
        store = StoreSupervisor(master, actors.store_node, found(config.store.segment_bytes), recovery)
        stack.callback(store.close)
        controller = ControllerClient(actors.controller(), recovery.hang_seconds, recovery.start_seconds)
        controller.begin(prepared.go_back_to)
        if config.monitor.ui:
            page = _open_page(config, PageControls(folder.path, controller.actor), view)
            after_cluster.callback(page.close)  # meanwhile, who watches it sees how the run has ended
        save_config(config, folder.config)
        stack.callback(folder.handle.unlink, missing_ok=True)
        handle = {
            "address": cluster.address,
            "namespace": namespace(folder.path),
            "auth_mode": os.environ["RAY_AUTH_MODE"],
            "machine": cluster.only_machine,
            "store_metrics": master.endpoint.metrics,
            **this_process(),
        }
        write_atomically(folder.handle, lambda file: file.write(json.dumps(handle).encode()))
        trackers = open_trackers(config.monitor, folder.path, view.message)
        stack.callback(trackers.close)
        yield Session(prepared, actors, controller, store, trackers, view, interrupts)


def _open_page(config: Config, controls: PageControls, view: View) -> ServerThread:
    """The run's page, served by this process."""
    ensure_token(config.run_dir)
    page = ServerThread(PageServer([config.run_dir], lambda _: controls, config.monitor.ui_port))
    view.message(f"page: {page.server.url}", secret=token_hint(config.run_dir))
    return page


def _start_master(config: Config, cluster: Cluster) -> MooncakeMaster:
    try:
        return MooncakeMaster(
            log_path=RunFolder(config.run_dir).log("mooncake_master"),
            host=cluster.host,
            port=config.store.master_port,
            protocol=config.store.protocol,
        )
    except StoreUnavailable as error:
        raise RunFailed(str(error)) from None


def _check_cluster(prepared: Prepared, cluster: Cluster) -> None:
    """Raises ValueError: one line for each thing that the nodes lack: room for the run, and all that it needs there."""
    config = prepared.config
    nodes = check_pools(cluster.nodes, config, prepared.plan.threads, prepared.resolved.on_gpu)
    check_nodes(nodes, prepared.folder.path, Path(config.target.path))


def _summary(prepared: Prepared, status: RunStatus, stopped: bool, seconds: float) -> RunSummary:
    folder = prepared.folder
    if status.last_step is not None:
        draw_curves(folder.path)
    return RunSummary(
        run_dir=folder.path,
        steps=status.step,
        samples=status.samples.get("trained", 0) + status.samples.get("committed", 0),
        rejected=status.samples.get("rejected", 0) + len(prepared.train.rejected),
        seconds=seconds,
        stopped=stopped,
        checkpoint=folder.newest_checkpoint(),
        export=folder.export if folder.export.exists() and not status.export_failure else None,
        last_step=status.last_step,
        last_heldout=status.last_heldout,
        export_failure=status.export_failure,
    )
