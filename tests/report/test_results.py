"""What lies in `results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results"
BEFORE = ("ablations", "choices", "compare", "quickstart.json", "smollm2")
"""Made before files named the commit; git says with which they came."""
SPEED_BEFORE = ("decode-", "ffn-", "limit", "step-")


def names_a_commit(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("commit")) or any(map(names_a_commit, value.values()))
    return isinstance(value, list) and any(map(names_a_commit, value))


def test_results_name_the_commit_they_were_made_at():
    unnamed = []
    for path in RESULTS.rglob("*.json"):
        room, *_ = path.relative_to(RESULTS).parts
        old = room in BEFORE or (room == "speed" and path.name.startswith(SPEED_BEFORE))
        if not old and not names_a_commit(json.loads(path.read_text())):
            unnamed.append(str(path))
    assert not unnamed
    assert {room.name for room in RESULTS.iterdir()} >= {"faults.json", "gpu", "speed", "study", *BEFORE}
