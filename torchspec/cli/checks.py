"""What ``torchspec doctor`` looks at: one small function each, which tells what it found and how to mend it.

A *fail* stops every run; a *warn* stops some, or makes them slow. Checks change nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from torchspec.cli.units import human_bytes
from torchspec.data.builtin_target import CACHE, MODEL
from torchspec.inference.sglang_patch import SUPPORTED_VERSION, PatchError, check_patched
from torchspec.processes.janitor import MARK
from torchspec.processes.leftovers import SHARED_MEMORY, find_shared_memory_leftovers

GIB = 1 << 30
LONGEST_TEMPORARY_FOLDER = 20
"""Paths of sockets may have 107 bytes, and Ray's are 87 longer than this folder."""


@dataclass(frozen=True)
class Finding:
    """What a check says."""

    level: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""
    """What to do about it; empty where nothing is to be done."""


def check_python() -> Finding:
    have = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 13):
        return Finding("ok", f"{have} ({sys.executable})")
    return Finding("fail", have, "use Python 3.11 or 3.12")


def check_packages(package: str = "torchspec") -> Finding:
    """Everything that ``package`` requires, extras aside, in a version that it allows."""
    wrong = []
    requirements = [Requirement(text) for text in requires(package) or ()]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing (wanted {requirement.specifier})")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            wrong.append(f"{requirement.name} is {have} (wanted {requirement.specifier})")
    if wrong:
        return Finding("fail", "; ".join(wrong), "make setup, or: pip install -e '.[cpu]' (with a GPU: '.[cuda]')")
    some = f"ray {version('ray')} and transformers {version('transformers')}"
    return Finding("ok", f"{len(wanted)} as pinned, {some} among them")


def check_torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("fail", str(error), "pip install torch==2.13.0")
    if torch.cuda.is_available():
        return Finding("ok", f"{torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    if shutil.which("nvidia-smi"):
        fix = "install the CUDA build of torch, or set training.device=cpu"
        return Finding("warn", f"{torch.__version__} sees no GPU, though this machine has nvidia-smi", fix)
    return Finding("ok", f"{torch.__version__}, CPU only")


def check_libibverbs(library: str = "libibverbs.so.1") -> Finding:
    """The one system library that Mooncake needs."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return Finding("fail", str(error), "sudo apt-get install -y libibverbs1")
    return Finding("ok", library)


def check_mooncake(module: str = "mooncake.store") -> Finding:
    try:
        importlib.import_module(module)
    except ImportError as error:
        fix = "pip install mooncake-transfer-engine-non-cuda==0.3.13.post1 (with a GPU: mooncake-transfer-engine)"
        return Finding("fail", str(error), fix)
    return Finding("ok", f"{module} can be imported")


def check_mooncake_master(binary: Path | None = None) -> Finding:
    """The store's master starts: it is there, executable, and finds its libraries."""
    if binary is None:
        spec = importlib.util.find_spec("mooncake")
        if spec is None or spec.origin is None:
            return Finding("fail", "mooncake is not installed", "see above")
        binary = Path(spec.origin).with_name("mooncake_master")
    try:
        run = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30)
    except OSError as error:
        return Finding("fail", f"{binary}: {error.strerror}", "reinstall the Mooncake package")
    if run.returncode != 0:
        return Finding("fail", f"{binary}: {run.stderr.strip()}", "sudo apt-get install -y libibverbs1")
    return Finding("ok", run.stdout.splitlines()[0])


def check_sglang() -> Finding:
    try:
        files = check_patched()
    except PatchError as error:
        install = f"pip install --no-deps sglang=={SUPPORTED_VERSION}"
        fix = f"make setup; with a wheel: {install} && python -m torchspec.inference.sglang_patch apply"
        return Finding("fail", str(error), fix)
    return Finding("ok", f"{version('sglang')}, patched ({files} files)")


def check_plugins(package: str = "torchspec") -> Finding:
    """SGLang finds our plugins by their entry points; without them it captures nothing."""
    ours = [e for e in distribution(package).entry_points if e.group.startswith("sglang.")]
    missing = [e.name for e in ours if not _module_exists(e.module)]
    if missing or not ours:
        return Finding("fail", f"not registered: {', '.join(missing) or 'all of them'}", "pip install -e . --no-deps")
    return Finding("ok", ", ".join(f"{e.group}:{e.name}" for e in ours))


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    fix = "mount a tmpfs there; in Docker: --shm-size=4g"
    if not folder.is_dir():
        return Finding("fail", f"{folder} does not exist", fix)
    total, _, free = shutil.disk_usage(folder)
    return _graded(free, GIB, 0, f"{folder}: {human_bytes(free)} free of {human_bytes(total)}", fix)


def check_disk(folder: Path = Path(), wanted: int = 10 * GIB, least: int = 2 * GIB) -> Finding:
    """Room for runs in ``folder`` (checkpoints, exports, logs)."""
    free = shutil.disk_usage(folder).free
    detail = f"{human_bytes(free)} free in {folder.absolute()}"
    return _graded(free, wanted, least, detail, "make room, or put runs elsewhere with run.dir=...")


def check_memory(wanted: int = 12 * GIB, least: int = 6 * GIB) -> Finding:
    """``wanted`` is what the quickstart is comfortable with."""
    memory = psutil.virtual_memory()
    detail = f"{human_bytes(memory.available)} available of {human_bytes(memory.total)}"
    fix = "end other programs, or lower inference.workers, store.segment_bytes, inference.max_total_tokens"
    return _graded(memory.available, wanted, least, detail, fix)


def check_cores(wanted: int = 2) -> Finding:
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} usable, load {psutil.getloadavg()[0]:.1f}"
    return _graded(cores, wanted, 1, detail, "works, but engines and trainer share one core: use a larger machine")


def check_target(folder: Path = CACHE / MODEL) -> Finding:
    """The quickstart's target."""
    folder = folder.expanduser()
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return Finding("ok", str(folder))
    fix = "python -m torchspec.data.builtin_target"
    return Finding("warn", f"{folder} is not there (only the quickstart needs it)", fix)


def check_ports(host: str = "127.0.0.1") -> Finding:
    """A few ports can be bound and connected to, as Ray, the store and the engines will do."""
    try:
        for _ in range(8):
            with socket.create_server((host, 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
                pass
    except OSError as error:
        return Finding("fail", f"{host}: {error.strerror}", "allow this user to bind ports there; check the firewall")
    return Finding("ok", f"{host} can be bound and reached")


def check_ray_token() -> Finding:
    """Whoever reads Ray's token can have Ray run code in this user's name."""
    from torchspec.driver.cluster import token_file

    file = token_file()
    if os.environ.get("RAY_AUTH_TOKEN") or not file.exists():
        return Finding("ok", "in RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else "the first run makes it")
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        fix = f"chmod 600 {file}; if others use this machine: remove it while nothing of Ray runs, for a new one"
        return Finding("warn", f"{file} can be read by others", fix)
    return Finding("ok", f"{file}, readable by its owner alone")


def check_temporary_folder() -> Finding:
    """Ray's sockets live below the temporary folder."""
    folder = tempfile.gettempdir()
    if len(folder) > LONGEST_TEMPORARY_FOLDER:
        return Finding("warn", f"{folder} is too long a path for Ray's sockets", "export TMPDIR=/tmp")
    return Finding("ok", folder)


def check_stale_processes() -> Finding:
    """Processes of a run whose driver and janitor are both gone, which only ``kill -9`` of both can do."""
    runs: dict[str, list[int]] = defaultdict(list)
    guarded: set[str] = set()
    for process in psutil.process_iter(["pid", "environ", "cmdline"]):
        command = process.info["cmdline"] or []
        if "torchspec.processes.janitor" in command:
            guarded.update(command)
        mark = (process.info["environ"] or {}).get(MARK)
        if mark is not None:
            runs[mark].append(process.info["pid"])
    stale = sorted(pid for mark, pids in runs.items() if mark not in guarded for pid in pids)
    if stale:
        fix = f"kill -9 {' '.join(map(str, stale))}"
        return Finding("warn", f"{len(stale)} processes of a run that has ended", fix)
    return Finding("ok", f"none ({len(runs)} running)" if runs else "none")


def check_leftovers(folder: Path = SHARED_MEMORY) -> Finding:
    """Files of ended engines in ``/dev/shm``: memory that nobody gives back."""
    left = sorted(entry.name for entry in find_shared_memory_leftovers(0.0, folder))
    if left:
        fix = f"cd {folder} && rm {' '.join(left)}"
        return Finding("warn", f"{len(left)} files in {folder} that no process uses", fix)
    return Finding("ok", "none")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "libibverbs": check_libibverbs,
    "mooncake": check_mooncake,
    "mooncake master": check_mooncake_master,
    "sglang": check_sglang,
    "sglang plugins": check_plugins,
    "shared memory": check_shared_memory,
    "disk": check_disk,
    "memory": check_memory,
    "cores": check_cores,
    "ports": check_ports,
    "ray token": check_ray_token,
    "temporary folder": check_temporary_folder,
    "target checkpoint": check_target,
    "stale processes": check_stale_processes,
    "leftovers": check_leftovers,
}


def _graded(have: float, wanted: float, least: float, detail: str, fix: str) -> Finding:
    if have >= wanted:
        return Finding("ok", detail)
    return Finding("warn" if have >= least else "fail", detail, fix)


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
