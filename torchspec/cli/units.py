"""Figures as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """``1536`` becomes ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1023.95 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """``75`` becomes ``1m15s``, ``7500`` becomes ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def human_count(count: float) -> str:
    """``12345`` becomes ``12,345`` and ``12345678`` becomes ``12.3M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:,.0f}"


def human_rate(rate: float) -> str:
    """A figure per second with three digits that matter: ``0.123``, ``4.56``, ``78.9``, ``1,234``."""
    if rate == 0:
        return "0"
    if rate >= 99.95:
        return human_count(rate)
    return f"{rate:.1f}" if rate >= 9.995 else f"{rate:.2f}" if rate >= 0.9995 else f"{rate:.3f}"
