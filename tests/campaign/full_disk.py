"""A disk that fills up under a command: one line says so, nothing is lost, and the same command goes on with more room.

python -m tests.campaign.full_disk [--json FILE] [COMMAND]  # 10 minutes; as root on Linux, which can mount a small disk
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from lte.models import train_tokenizer
from tests import models

TEXT = "A small text, of some words and few lines, that is read again and again.\n"
ROOM = (0, 4, 40, 120, 400, 1100)
"""KiB that are left when a command begins."""

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def commands(root: Path, disk: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> the command with its output on the disk, and what is added to go on with it."""
    text = ["--task", "lm", "--data", str(root / "text.txt"), "--context-length", "16"]
    dense = ["--model", str(root / "dense"), *text, "--batch-size", "4"]
    steps = ["--set", "training.max_steps=6", "--set", "training.save_steps=2"]
    out = ["--out", str(disk / "out")]
    kept = ["--out", str(disk / "kept"), "--overwrite"]
    sparse = str(disk / "kept")
    made = ["--config", str(root / "config.json"), "--data", str(root / "text.txt"), "--vocab-size", "300"]
    return {
        "init": (["init", *made, *out], []),
        "train": (["train", *dense, "--target-sparsity", "0.4", *steps, *out], ["--resume"]),
        "train over another": (["train", *dense, "--target-sparsity", "0.4", *steps, *kept], []),
        "finetune": (["finetune", *dense, *steps, *out], ["--resume"]),
        "sparsify": (["sparsify", "--model", str(root / "dense"), *text, "--target-sparsity", "0.4", *out], []),
        "sparsify over another": (
            ["sparsify", "--model", str(root / "dense"), *text, "--target-sparsity", "0.4", *kept],
            [],
        ),
        "quantize": (["quantize", str(root / "dense"), "--weights", "int8", *out], []),
        "calibrate": (["calibrate", sparse, *text, "--target-sparsity", "0.5"], []),
        "evaluate": (["evaluate", sparse, *text, "--json", str(disk / "result.json")], []),
        "compare": (
            [
                "compare",
                *dense,
                "--eval-data",
                str(root / "text.txt"),
                "--methods",
                "kla",
                "--sparsities",
                "0.5",
                "--steps",
                "2",
                "--decode-tokens",
                "0",
                *out,
            ],
            [],
        ),
    }


def run(words: list[str], cwd: Path) -> tuple[int, str]:
    """Exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "lte_start", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


def digest(folder: Path) -> dict[str, str]:
    """Every file's content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def weights(words: list[str], disk: Path) -> dict[str, str]:
    """What a command makes, of all that it writes: what does not say when."""
    found = digest(disk / "kept" if "--overwrite" in words or words[0] in ("calibrate", "evaluate") else disk / "out")
    return {name: value for name, value in found.items() if name in ("model.safetensors", "config.json")}


def case(name: str, words: list[str], more: list[str], room: int, root: Path, disk: Path) -> tuple[str, str]:
    """``refused`` or ``fits``, or what went wrong."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(root / "sparse", disk / "kept")
    before = digest(disk / "kept")
    filler = disk / "filler"
    left = shutil.disk_usage(disk).free - room * 1024
    filler.write_bytes(b"\0" * left)
    code, said = run(words, root)
    if code == 0:
        return "fits", ""
    errors = re.findall("error: .*", said)
    if code != 2 or len(errors) != 1 or "no space left" not in errors[0] or "Traceback" in said:
        return "wrong", f"exit code {code}: {said[-400:]}"
    kept = next((folder for folder in (disk / "kept.replaced", disk / "kept") if folder.is_dir()), disk)
    lost = [file for file, content in before.items() if digest(kept).get(file) != content]
    if lost:
        return "lost", f"{lost}"
    filler.unlink()
    if more and not (disk / "out" / "recipe.yaml").is_file():
        more = []
    code, said = run([*words, *more], root)
    if code and "is not empty" in said:
        return "stuck", said[-300:]
    if code:
        return "wrong after", f"exit code {code}: {said[-400:]}"
    return "refused", ""


def main() -> None:
    """Run every command on every disk; print and write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="?", default="")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    root, disk = Path(tempfile.mkdtemp(prefix="lte-disk-")), Path(tempfile.mkdtemp(prefix="lte-small-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    counts, wrong = Counter[str](), list[str]()
    try:
        (root / "text.txt").write_text(TEXT * 400)
        (root / "config.json").write_text(json.dumps(CONFIG))
        model = models.build("llama")
        model.resize_token_embeddings(280)
        model.save_pretrained(root / "dense")
        train_tokenizer([TEXT], 280).save_pretrained(root / "dense")
        every = commands(root, disk)
        made = [*every["sparsify"][0][:-1], str(root / "sparse")]
        assert run(made, root)[0] == 0
        for name, (words, more) in every.items():
            if not name.startswith(given.command):
                continue
            plain: dict[str, str] = {}
            for room in reversed(ROOM):
                kind, said = case(name, words, more, room, root, disk)
                found = weights(words, disk)
                plain = plain or found
                if kind in ("fits", "refused") and found != plain:
                    kind, said = "different", f"{found} {plain}"
                counts[kind] += 1
                if kind not in ("fits", "refused"):
                    wrong.append(f"{name}, {room} KiB: {kind}: {said}")
                print(name, room, kind, said[-300:] if kind not in ("fits", "refused") else "", flush=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(root)
    print(dict(counts))
    if given.json:
        given.json.write_text(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=2) + "\n")


if __name__ == "__main__":
    main()
