"""No test is left out in silence: where ``CI`` is set, a skip that is not on the list fails.

What CI installs itself (``make tools``: a browser, Prometheus) is not on it.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

ALLOWED = (
    "no CUDA device",
    "network namespaces need root",
    "network namespaces are not permitted here",
    "this machine has no address but loopback",
    "benchmarks/vllm_accept.py has made no environment",
)
"""What a machine may lack, in the words with which tests skip."""

Report = pytest.TestReport | pytest.CollectReport


def judged(report: Report) -> Report:
    """The report, which has failed if it tells of a skip for a reason that is not :data:`ALLOWED`."""
    if report.skipped and not hasattr(report, "wasxfail"):
        assert isinstance(report.longrepr, tuple)
        *_, reason = report.longrepr
        if not any(allowed in reason for allowed in ALLOWED):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nA skip that the list in tests/skips.py does not hold, and this is CI."
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, Report]:
    report = yield
    return judged(report) if "CI" in os.environ else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, Report]:
    report = yield
    return judged(report) if "CI" in os.environ else report
