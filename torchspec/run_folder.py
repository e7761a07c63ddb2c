"""A run's folder: every file in it by name, its checkpoints, and whether a driver lives. Standard library only.

RUN/                       readable by its owner alone, unless somebody opens it (chmod)
  config.yaml              the resolved config, with the sizes of the moment; a folder with it is a run
  rejected.jsonl           prompts that cannot be trained on, and samples that could not be made, with the reason;
                           and how many conversations were changed, and why
  answers.jsonl            what the target wrote, for later epochs and other runs
  draft_vocab.json         the draft's vocabulary
  ledger.jsonl             the journal, from which ``torchspec verify`` proves that nothing was lost
  metrics.jsonl            one line a step and a held-out evaluation: a StepReport and its time
  metrics/                 what a run measures about itself (monitor/snapshot.py)
    latest.json            the newest Snapshot: everything that is known, each worker and rank by itself
    history.jsonl          one HistoryPoint a line: totals over the pools, the whole run (monitor/series.py)
    entities.jsonl         one EntityPoint a line, fewer of them: a few counters of each worker and each rank
    events.jsonl           faults, scaling, checkpoints, rejections: an Event a line
    evaluations.jsonl      what ``torchspec eval`` measured of the run's drafts
    samples.jsonl          how single samples went through the system (monitor/record/timeline.py)
  checkpoints/             step_000123/, and the links latest and best (training/checkpoint.py)
  export/                  the newest draft, as servers load it
  exports/step_000123/     the draft of a checkpoint (``torchspec export``)
  curves.png               drawn at the end
  evaluation.json          what the quickstart's draft was worth in a server
  trace.json               of followed samples (``torchspec trace``)
  logs/NAME.log            of each actor, of the store's master, and of the driver
  profile/rank-0.json.gz   of the steps in ``monitor.profile_steps``
  handle.json              while it runs: where its controller is, and who drives it
  driver.lock              held by the driver
  ui_token                 lets the page control the run
  tensorboard/, wandb_id, mlflow_run, mlflow.db    of the trackers (monitor/trackers/)
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

LEDGER_FILE = "ledger.json"
"""In a checkpoint: which samples its steps have consumed."""


class RunFolder:
    """The files of the run in ``path``, whether they are there or not."""

    def __init__(self, path: Path):
        self.path, metrics = path, path / "metrics"
        self.config, self.handle = path / "config.yaml", path / "handle.json"
        self.lock, self.token = path / "driver.lock", path / "ui_token"
        self.journal, self.rejected = path / "ledger.jsonl", path / "rejected.jsonl"
        self.answers, self.draft_vocab = path / "answers.jsonl", path / "draft_vocab.json"
        self.steps, self.latest = path / "metrics.jsonl", metrics / "latest.json"
        self.history, self.entities = metrics / "history.jsonl", metrics / "entities.jsonl"
        self.events, self.evaluations = metrics / "events.jsonl", metrics / "evaluations.jsonl"
        self.samples, self.trace = metrics / "samples.jsonl", path / "trace.json"
        self.curves, self.evaluation = path / "curves.png", path / "evaluation.json"
        self.checkpoints, self.export, self.exports = path / "checkpoints", path / "export", path / "exports"

    @classmethod
    def around(cls, path: Path) -> RunFolder | None:
        """That of the run which ``path`` lies in, if there is one."""
        return next((run for run in map(cls, path.absolute().parents) if run.exists()), None)

    def exists(self) -> bool:
        """Whether there is a run that this user can read, running or not."""
        try:
            return self.config.is_file()
        except PermissionError:
            return False

    def make(self) -> None:
        """Make the folder, if it is not there, for its owner alone: it holds what was asked and answered."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def expect(self, run: bool) -> None:
        """Raises ValueError: there is none to resume, or, without ``run``, one where a new one is to be."""
        if self.exists() and not run:
            raise ValueError(
                f"the run {self.path} exists already: continue it with `torchspec resume {self.path}`, or choose "
                "another name with run.name=..."
            )
        if run and not self.exists():
            raise ValueError(f"there is nothing to resume in {self.path}: it has no config.yaml")

    def log(self, name: str) -> Path:
        """Of an actor or a process."""
        return self.path / "logs" / f"{name}.log"

    def logs(self) -> dict[str, Path]:
        """Those that there are, by name."""
        return {path.stem: path for path in sorted((self.path / "logs").glob("*.log"))}

    def profile(self, rank: int) -> Path:
        return self.path / "profile" / f"rank-{rank}.json.gz"

    def checkpoint(self, step: int) -> Path:
        """Of one step."""
        return self.checkpoints / f"step_{step:06d}"

    def newest_checkpoint(self) -> Path | None:
        """The newest complete one; None before the first."""
        pointer = self.checkpoints / "latest"
        return pointer.resolve() if pointer.exists() else None

    def last_checkpoint(self, committed_step: int) -> Path | None:
        """Where a run goes on that has committed a step: its checkpoint, or a newer one that nobody has told of.

        A shared file system may show another machine an older ``latest`` for a while.

        Returns:
            None: the beginning.

        Raises:
            ValueError: that checkpoint is gone. To train its steps again would be to train them twice.
        """
        newest = self.newest_checkpoint()
        if newest is None or int(newest.name.removeprefix("step_")) < committed_step:
            newest = self.checkpoint(committed_step) if committed_step else None
        if newest is None or (newest / LEDGER_FILE).is_file():
            return newest
        there = self._checkpoint_names().items()
        others = ", ".join(name for name, folder in there if name != "best" and (folder / LEDGER_FILE).is_file())
        way_out = (
            f"go on from an older one ({others}) with `torchspec resume {self.path} --from STEP`"
            if others
            else "there is no other: start a new run, with another run.name"
        )
        raise ValueError(
            f"{newest} is gone or not complete, and {self.journal.name} says that step {committed_step} is committed: "
            f"put it back, or {way_out}"
        )

    def find_checkpoint(self, which: str) -> Path:
        """``best``, or that of a step.

        Raises:
            ValueError: there is no such checkpoint.
        """
        there = self._checkpoint_names()
        if which not in there:
            raise ValueError(f"{self.path} has no checkpoint {which}; it has {', '.join(there) or 'none'}")
        return there[which]

    def _checkpoint_names(self) -> dict[str, Path]:
        """Those that there are, by step and as ``best``."""
        folders = [folder for folder in sorted(self.checkpoints.glob("step_*")) if not folder.suffix]
        there = {folder.name.removeprefix("step_").lstrip("0"): folder for folder in folders}
        if (best := self.checkpoints / "best").exists():
            there["best"] = best.resolve()
        return there

    def hold(self) -> IO[str]:
        """The run's lock, of which there is one: closing it lets go, and so does the end of this process.

        Raises:
            ValueError: somebody else has it, or its folder cannot be locked.
        """
        try:
            self.make()
            file = self.lock.open("w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is running already; see it with: torchspec status {self.path}") from None
        except OSError as error:
            raise ValueError(
                f"run.dir: {self.path} cannot be locked ({error.strerror}); it must be writable, on a file system with "
                "flock"
            ) from None
        return file

    def is_live(self) -> bool:
        """Whether the run has a driver: on this machine one that lives, elsewhere one that has not ended."""
        try:
            handle = self.read_handle()
        except FileNotFoundError:
            return False
        return handle["host"] != socket.gethostname() or _started_at(handle["pid"]) == handle["started"]

    def read_handle(self) -> dict[str, Any]:
        """``address`` of the cluster, ``namespace`` in it and ``auth_mode`` (does it ask for a token), ``machine`` (the
        address of the only one that the run may use; None: all), ``store_metrics``, and what :func:`this_process` says
        of the driver.

        Raises:
            FileNotFoundError: it does not run.
        """
        handle: dict[str, Any] = json.loads(self.handle.read_text())
        return handle


def this_process() -> dict[str, Any]:
    """What a handle says of the driver, which calls this."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started_at(os.getpid())}


def _started_at(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
