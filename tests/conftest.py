"""With LTE_ALL_TESTS=1, as in CI, a test that was skipped although this machine can run it fails the session."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

MAY_BE_MISSING = (
    "needs a GPU",
    "the development model is not here",
    "needs ../shared/data",
    "not told there",
    "the interpreter of Triton 3.6",
)
"""Reasons to skip that are no fault of the build: what CI's machine does not have."""

FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw"}, "avx512_bf16": {"avx512_bf16", "avx512_vnni"}}
"""Instruction sets of the kernels, and what Linux calls what they need."""


def unexpected(reason: str) -> bool:
    """Whether a test that says so should have run here."""
    if any(text in reason for text in MAY_BE_MISSING):
        return False
    lacking = reason.rpartition("this processor or build lacks ")[2] if "this processor or build" in reason else ""
    if lacking in FLAGS:
        return FLAGS[lacking] <= _processor_flags()
    return True


def _processor_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    if not file.is_file() or platform.machine() != "x86_64":
        return set()
    lines = [line for line in file.read_text().splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and unexpected(report.longrepr[2]):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and unexpected(report.longrepr[2]):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("LTE_ALL_TESTS") and _skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("LTE_ALL_TESTS") and _skipped:
        terminalreporter.section("skipped, although this machine can run them (LTE_ALL_TESTS)")
        for line in sorted(set(_skipped)):
            terminalreporter.line(line)
