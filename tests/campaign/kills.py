"""Runs that are killed at random and resumed end bit-equal to the one that was not, comparisons with the same table.

python -m tests.campaign.kills [--kills 100] [--processes 1] [--signal KILL|TERM|INT] [--json FILE]    # 15 s a kill
python -m tests.campaign.kills --of compare --kills 8                                                  # 30 s a kill
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from lte.models import train_tokenizer
from tests import models

TEXT = "A small text, of some words and few lines, that is read again and again.\n"
STEPS = 400
PATIENCE = 600
"""Seconds after which a run hangs."""


def start_and_end(root: Path, out: Path) -> list[str]:
    """Flags of model, data and result."""
    return ["--model", str(root / "dense"), "--task", "lm", "--data", str(root / "text.txt"), "--out", str(out)]


def command(root: Path, out: Path, processes: int, *more: str) -> list[str]:
    """``lte train`` in as many processes."""
    start = [sys.executable, "-m", "lte_start"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += ["-m", "lte_start"]
    words = ["train", *start_and_end(root, out)]
    words += ["--context-length", "16", "--batch-size", "4", "--target-sparsity", "0.4"]
    words += [
        "--set",
        f"training.max_steps={STEPS}",
        "--set",
        "training.save_steps=20",
        "--set",
        "training.save_total_limit=2",
    ]
    return [*start, *words, *more]


def comparison(root: Path, out: Path) -> list[str]:
    """``lte compare``, which the same line goes on with."""
    words = ["compare", *start_and_end(root, out)]
    words += ["--methods", "lte,kla,teal,moefication,dejavu,prune-wanda", "--sparsities", "0.5", "--steps", "40"]
    words += ["--set", "lte.expert_size=8", "--set", "moefication.expert_size=8", "--set", "dejavu.rank=8"]
    words += ["--context-length", "16", "--batch-size", "4", "--decode-tokens", "0"]
    words += ["--eval-data", str(root / "text.txt"), "--set", "task.limit=60"]
    return [sys.executable, "-m", "lte_start", *words]


def ended_as(whole: Path, killed: Path, of: str) -> bool:
    """Whether a run that was killed left what the whole one did."""
    if of == "compare":
        tables = [folder / "table.md" for folder in (whole, killed)]
        left = [path for path in killed.rglob("*") if path.name.endswith((".partial", ".new"))]
        return tables[1].is_file() and tables[0].read_text() == tables[1].read_text() and not left
    wanted, file = load_file(whole / "model.safetensors"), killed / "model.safetensors"
    return file.is_file() and all(torch.equal(value, wanted[key]) for key, value in load_file(file).items())


def chain(
    root: Path, name: str, kills: int, given: argparse.Namespace, number: int, chance: random.Random
) -> tuple[int, list[str]]:
    """Kill a run so many times, or until it is done; kills made, and what went wrong."""
    out, made, wrong = root / name, 0, list[str]()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while True:
        resume = ["--resume"] if (out / "recipe.yaml").is_file() else []
        words = comparison(root, out) if given.of == "compare" else command(root, out, given.processes, *resume)
        process = subprocess.Popen(
            words,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell's background jobs ignore it, and hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        if made < kills:
            # Some before the first step, most in the middle of training.
            begun, patience = time.monotonic(), chance.uniform(2, 6) if given.of == "train" else chance.uniform(6, 60)
            log = out / ("training_log.jsonl" if given.of == "train" else "study.yaml")
            while process.poll() is None and not log.is_file() and time.monotonic() - begun < 60:
                time.sleep(0.05)
            if process.poll() is None:
                time.sleep(chance.uniform(0, patience) / 3)
            if process.poll() is None:
                os.killpg(process.pid, number)
                made += 1
        try:
            said = process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            wrong.append(f"{name}: went on for {PATIENCE} s")
            return made, wrong
        if "Traceback" in said and number != signal.SIGKILL:
            wrong.append(f"{name}: a traceback: {said[-300:]}")
        if process.returncode == 0:
            return made, wrong
        told = process.returncode == 143 and said.count("stopped by SIGTERM; ") == 1
        alone = given.of == "train" and number == signal.SIGTERM and given.processes == 1
        if alone and process.returncode > 0 and not told:
            wrong.append(f"{name}: SIGTERM ended with {process.returncode}: {said[-300:]}")
        if process.returncode not in (-number, 128 + number, 130, 143) and (given.processes == 1 or made >= kills):
            wrong.append(f"{name}: ended with {process.returncode}: {said[-300:]}")
            return made, wrong


def main() -> None:
    """Run chains until there were as many kills as asked for; print and write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--of", choices=["train", "compare"], default="train")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    root, chance = Path(tempfile.mkdtemp(prefix="lte-kills-")), random.Random(0)
    model = models.build("llama")
    model.resize_token_embeddings(280)
    model.save_pretrained(root / "dense")
    train_tokenizer([TEXT], 280).save_pretrained(root / "dense")
    (root / "text.txt").write_text(TEXT * 400)
    chain(root, "whole", 0, given, signal.SIGKILL, chance)
    counts, wrong = Counter[str](), list[str]()
    while counts["kills"] < given.kills:
        name = f"chain-{counts['chains']}"
        left = min(chance.randint(1, 4), given.kills - counts["kills"])
        number = getattr(signal, f"SIG{given.signal}")
        made, found = chain(root, name, left, given, number, chance)
        counts["kills"] += made
        counts["chains"] += 1
        wrong += found
        same = ended_as(root / "whole", root / name, given.of)
        counts["bit-equal" if same else "different"] += 1
        if not same:
            wrong.append(f"{name}: another result than of the run that was not killed")
        print(dict(counts), wrong[-1:] if not same else "", flush=True)
        shutil.rmtree(root / name, ignore_errors=True)
        if not made:
            break
    if given.json:
        about = {"of": given.of, "signal": given.signal, "processes": given.processes}
        given.json.write_text(json.dumps({**about, "counts": dict(counts), "wrong": wrong}, indent=2) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
