"""What this machine computes with: the device, its memory, the dtype that is fast on it, and how fast that could be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "B200": 2250e12,
}
"""Dense bfloat16 operations a second by a part of the device's name, from NVIDIA's data sheets; first match counts."""

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of the container that this process is in: version 2, version 1."""


def usable_memory() -> int:
    """Bytes of this machine, or of the container if it may have fewer."""
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.is_file()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit != "max")])


def device_memory(device: Device) -> int:
    """Bytes that one process's computations may take: of a GPU, or of the machine."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else usable_memory()


def pick_device(wanted: Literal["auto", "cpu", "cuda"], knob: str) -> Device:
    """The device for ``knob``.

    Raises:
        ValueError: ``cuda`` where torch sees none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{knob} is cuda, but torch sees no CUDA device; use auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def fast_dtype(device: Device) -> Literal["bfloat16", "float32"]:
    """bfloat16 where the hardware multiplies it; a CPU without such instructions is several times faster in float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    on_cpu = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if device == "cuda" or on_cpu else "float32"


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations a second that ``device`` is sold with; None where that is not known (CPUs, other dtypes)."""
    import torch

    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
