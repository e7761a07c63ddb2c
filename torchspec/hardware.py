"""What this machine computes with: the device, and the dtype that is fast on it."""

from __future__ import annotations

from typing import Literal

Device = Literal["cpu", "cuda"]


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
