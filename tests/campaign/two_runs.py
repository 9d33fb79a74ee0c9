"""Two runs of one command into one folder at once: one ends as it would alone, the other is refused or finds it done.

python -m tests.campaign.two_runs [--rounds 4] [--json FILE]    # 10 s a round and command
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.campaign.bad_inputs import build

PATIENCE = 300
"""Seconds after which a run hangs."""


def commands(at: dict[str, str], out: Path) -> dict[str, list[str]]:
    """What writes to a folder."""
    data = ["--data", at["text.txt"], "--context-length", "16"]
    run = ["--model", at["dense"], "--task", "lm", *data, "--out", str(out)]
    train = ["train", *run, "--target-sparsity", "0.4", "--set", "training.max_steps=30"]
    return {
        "train": train,
        "train --overwrite": [*train, "--overwrite"],
        "finetune": ["finetune", *run, "--set", "training.max_steps=30"],
        "sparsify": ["sparsify", *run, "--target-sparsity", "0.3"],
        "quantize": ["quantize", at["dense"], "--weights", "int8", "--out", str(out)],
        "calibrate": ["calibrate", str(out), *data, "--target-sparsity", "0.3"],
    }


def main() -> None:
    """Run them, print and write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    root, chance = Path(tempfile.mkdtemp(prefix="lte-two-runs-")), random.Random(0)
    at = build(root)
    out, counts, wrong = root / "out", Counter[str](), list[str]()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, words in commands(at, out).items():
        for number in range(given.rounds):
            shutil.rmtree(out, ignore_errors=True)
            before = {path.name for path in root.iterdir()}
            if name == "calibrate":
                shutil.copytree(at["sparse"], out)
            started = []
            for _ in range(2):
                line = [sys.executable, "-m", "lte_start", *words]
                pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
                started.append(subprocess.Popen(line, env=environment, text=True, **pipes))
                time.sleep(chance.uniform(0, 2))
            codes, said = [], []
            for process in started:
                try:
                    said.append(process.communicate(timeout=PATIENCE)[1])
                except subprocess.TimeoutExpired:
                    process.kill()
                    wrong.append(f"{name} {number}: went on for {PATIENCE} s")
                    said.append("")
                codes.append(process.returncode)
            errors = [text.strip().splitlines()[-1][:200] for code, text in zip(codes, said, strict=True) if code == 2]
            checked = subprocess.run(
                [sys.executable, "-c", LOADS, str(out)], env=environment, capture_output=True, text=True, check=False
            )
            left = {path.name for path in root.iterdir()} - before - {"out"}
            kind = "one refused" if 2 in codes else "one after the other"
            fine = set(codes) <= {0, 2, 3} and codes.count(2) < 2 and all(line.startswith("error: ") for line in errors)
            if not fine or checked.returncode or left or "Traceback" in "".join(said):
                kind = "wrong"
                wrong.append(f"{name} {number}: {codes}, {errors}, {sorted(left)}, {checked.stderr[-200:]}")
            counts[kind] += 1
            print(name, codes, kind, flush=True)
    if given.json:
        given.json.write_text(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=2) + "\n")
    shutil.rmtree(root)
    sys.exit(bool(wrong))


LOADS = """
import sys, json, lte, transformers
from pathlib import Path
from lte.thresholds import thresholds_of
out = Path(sys.argv[1])
config = json.loads((out / "config.json").read_text())
model = (lte.load if "quantization_config" in config else transformers.AutoModelForCausalLM.from_pretrained)(out)
points = config.get("quantization_config", {}).get("operating_points", [])
if points:  # the thresholds beside the weights are those of a point: of one run, not half of each
    held = thresholds_of(model)
    model.set_sparsity(points[-1]["sparsity"])
    moved = max(abs(then - now) for then, now in zip(held, thresholds_of(model), strict=True))
    assert moved < 1e-9, moved  # a point has it as a logit
"""


if __name__ == "__main__":
    main()
