"""What this machine computes with: the device, the dtype that is fast on it, and how fast that could be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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
