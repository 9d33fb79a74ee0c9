"""What a benchmark reports: rows, a table, and a JSON file that says what made it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from lte.inference.crossover import machine_name
from lte.versions import versions

Row = dict[str, Any]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""Largest error of the operator, relative to the largest value of the float32 reference."""


def report(rows: Sequence[Mapping[str, Any]], command: str, device: torch.device, **more: Any) -> dict[str, Any]:
    """The JSON of a benchmark."""
    return {
        "command": command,
        "machine": {
            "device": machine_name(device),
            "processor": _processor(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": versions(),
        **more,
        "rows": list(rows),
    }


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], title: str = "") -> Table:
    """A rich table of some columns: key -> heading; of a longer status (``failed: why``) the JSON holds the rest."""
    made = Table(title=title or None)
    for heading in columns.values():
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*(_cell(row.get(key)) for key in columns))
    return made


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value).partition(":")[0]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
