"""Every command on bad input: one line and exit code 2, no hang, nothing lost.

python -m tests.campaign.bad_inputs [--json FILE] [PATTERN]    # about 10 minutes for all
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import lte
import lte_start
from lte.models import train_tokenizer
from tests import models

SECONDS = 60
"""After which a command counts as hanging."""

NUMBERS = ["nan", "inf", "-1", "0", "1e400", "x", "", "[]", "{}", "null", "true"]
TEXT = "A small text, of some words and few lines, that is read again and again.\n"


class Hangs(BaseException):
    """A command went on for too long."""


def build(root: Path) -> dict[str, str]:
    """A folder with what the commands want, and with what they do not: name -> path."""
    tokenizer = train_tokenizer([TEXT], 280)
    model = models.build("llama")
    model.resize_token_embeddings(280)
    at = {name: str(root / name) for name in ("dense", "sparse", "text.txt", "empty.txt", "folder", "cut")}
    model.save_pretrained(at["dense"])
    made = lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    made.save_pretrained(at["sparse"])
    for folder in ("dense", "sparse"):
        tokenizer.save_pretrained(at[folder])
    (root / "text.txt").write_text(TEXT * 60)
    (root / "empty.txt").write_text("")
    (root / "folder").mkdir()
    shutil.copytree(at["sparse"], at["cut"])
    weights = Path(at["cut"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    files = {
        "latin.txt": "caf\xe9 \xe9\n".encode("latin-1") * 200,
        "zeros.bin": b"\0" * 4096,
        "broken.json": b"{",
        "list.json": b"[1, 2]",
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "other.jsonl": b'{"label": 1}\n' * 20,
        "numbers.jsonl": b'{"text": 3}\n' * 20,
        "broken.yaml": b"model: [\n",
        "list.yaml": b"- a\n- b\n",
        "odd.yaml": b"model: 3\ndata: {}\nout: null\n",
        "fake.gguf": b"GGUF" + b"\xff" * 64,
        "not.gguf": b"hello",
        "shape.json": json.dumps({"model_type": "llama", "hidden_size": -4}).encode(),
        "heads.json": json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}).encode(),
        "kind.json": json.dumps({"model_type": "nothing"}).encode(),
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
        at[name] = str(root / name)
    base = {"model": at["dense"], "data": at["text.txt"], "task": {"name": "lm", "context_length": 16}}
    study = {
        "results": str(root / "scratch" / "results"),
        "work": str(root / "scratch" / "work"),
        "base": base,
        "evaluate": {"data": at["text.txt"]},
        "series": {"a": {"command": "finetune", "set": {"training.max_steps": 1}}},
    }
    at["study.yaml"] = str(root / "study.yaml")
    (root / "study.yaml").write_text(json.dumps(study))
    for number, changed in enumerate(
        (
            {"evaluate": {}},
            {"evaluate": {"data": at["text.txt"], "batch_size": "x"}},
            {"evaluate": {"data": at["text.txt"], "decode_tokens": -1}},
            {"evaluate": {"data": str(root / "no.txt")}},
            {"series": {"a": {"command": "nothing"}}},
            {"series": {"a": {"dial": [2.0]}}},
            {"series": 3},
            {"results": at["text.txt"]},
            {"base": {**base, "model": at["empty.txt"]}},
            {"base": {**base, "data": at["empty.txt"]}},
        )
    ):
        at[f"study-{number}"] = str(root / f"study-{number}.yaml")
        (root / f"study-{number}.yaml").write_text(json.dumps({**study, **changed}))
    at["none"] = str(root / "no" / "such" / "place")
    at["under"] = str(root / "text.txt" / "out")
    return at


def commands(at: dict[str, str]) -> dict[str, list[str]]:
    """A good line of every command; what is bad is put at its end."""
    data = ["--data", at["text.txt"]]
    context = ["--context-length", "16"]
    run = ["--model", at["dense"], "--task", "lm", *data, *context, "--batch-size", "4", "--out", "OUT"]
    return {
        "train": ["train", *run, "--expert-size", "8", "--target-sparsity", "0.3", "--set", "training.max_steps=1"],
        "finetune": ["finetune", *run, "--set", "training.max_steps=1"],
        "sparsify": ["sparsify", *run, "--expert-size", "8", "--target-sparsity", "0.3"],
        "evaluate": ["evaluate", at["sparse"], *data, *context],
        "calibrate": ["calibrate", "SPARSE", *data, *context, "--target-sparsity", "0.3"],
        "quantize": ["quantize", at["dense"], "--weights", "int4", *data, *context, "--tokens", "64", "--out", "OUT"],
        "generate": ["generate", at["sparse"], "--prompt", "a", "--max-new-tokens", "2"],
        "inspect": ["inspect", at["sparse"]],
        "init": ["init", "--config", f"{at['dense']}/config.json", *data, "--vocab-size", "300", "--out", "OUT"],
        "ffn": ["bench", "ffn", "--d-model", "64", "--d-ff", "128", "--sparsity", "0.5"],
        "prefill": [
            *("bench", "prefill", "--config", f"{at['dense']}/config.json", "--tokens", "4", "--sparsity", "0.5"),
            *("--expert-size", "8", "--rounds", "1", "--no-llama-cpp"),
        ],
        "limit": ["bench", "limit", "--config", "llama-2-7b"],
        "decode": [
            *("bench", "decode", "--config", f"{at['dense']}/config.json", "--sparsity", "0.5", "--new-tokens", "4"),
            *("--expert-size", "8", "--rounds", "1", "--no-llama-cpp", "--no-compile"),
        ],
        "step": ["bench", "step", "--model", at["dense"], "--batch", "2", "--context", "8", "--rounds", "1"],
        "sweep": ["sweep", at["study.yaml"]],
        "methods": ["methods"],
        "tasks": ["tasks"],
        "compare": [
            *("compare", "--model", at["dense"], "--task", "lm", *data, *context, "--out", "OUT", "--steps", "1"),
            *("--methods", "kla", "--sparsities", "0.5", "--decode-tokens", "0"),
        ],
    }


def cases(at: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Name and line of every case."""
    good = commands(at)
    places = [name for name in at if name not in ("dense", "sparse", "text.txt") and "study" not in name]
    of_run = [
        *("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "weight_decay"),
        *("max_grad_norm", "warmup_steps", "gradient_accumulation_steps", "seed", "save_steps", "logging_steps"),
        *("adam_beta1", "optim", "lr_scheduler_type", "bf16", "no_such_setting"),
    ]
    of_ours = [
        *("target_sparsity", "eta", "stage1_epochs", "stage2_epochs", "router_learning_rate", "stage2_learning_rate"),
        *("router_weight_decay", "stage1_steps", "stage2_steps", "distill"),
    ]
    for command, names in (("train", of_run + of_ours), ("finetune", of_run)):
        for name in names:
            for value in NUMBERS:
                yield f"{command} training.{name}={value}", [*good[command], "--set", f"training.{name}={value}"]
    for setting in (
        *("optim_args=x", "torch_compile_backend=x", "torch_compile_mode=x", "deepspeed=x", "fsdp=x", "eval_delay=3"),
        *("gradient_checkpointing_kwargs=x", "lr_scheduler_kwargs=x", "label_names=x", "resume_from_checkpoint=x"),
        *("accelerator_config=x", "parallelism_config=x", "report_to=x", "log_level=x", "tf32=true", "debug=x"),
        *("load_best_model_at_end=true", "metric_for_best_model=x", "use_liger_kernel=true", "ddp_backend=x"),
    ):
        for command in ("train", "finetune"):
            yield f"{command} training.{setting}", [*good[command], "--set", f"training.{setting}"]
    for name in ("expert_size", "threshold", "grouping", "router_init", "router_init_score", "method", "no_such"):
        for value in NUMBERS:
            for command in ("train", "sparsify"):
                yield f"{command} sparsity.{name}={value}", [*good[command], "--set", f"sparsity.{name}={value}"]
    for name in ("context_length", "stride", "text_column", "limit", "name", "no_such"):
        for value in NUMBERS:
            yield f"finetune task.{name}={value}", [*good["finetune"], "--set", f"task.{name}={value}"]
    for command in ("train", "finetune", "sparsify", "evaluate", "calibrate", "quantize", "compare"):
        for place in places:
            yield f"{command} --data {place}", [*good[command], "--data", at[place]]
    for command in ("train", "finetune", "sparsify", "compare"):
        for place in [*places, "sparse"]:
            yield f"{command} --model {place}", [*good[command], "--model", at[place]]
    for command in ("evaluate", "calibrate", "quantize", "generate", "inspect"):
        for place in places:
            yield f"{command} {place}", [good[command][0], at[place], *good[command][2:]]
    for command in ("train", "finetune", "sparsify", "quantize", "compare", "init"):
        for place in ("text.txt", "under", "dense"):
            yield f"{command} --out {place}", [*good[command], "--out", at[place]]
    for command in ("train", "finetune", "sparsify"):
        for place in places:
            yield f"{command} recipe {place}", [command, at[place], "--out", "OUT"]
    for place in [*places, *(name for name in at if name.startswith("study-"))]:
        yield f"sweep {place}", ["sweep", at[place]]
    for place in places:
        yield f"--plugin {place}", ["--plugin", at[place], "methods"]
        if place != "none":
            yield f"methods --json {place}", ["methods", "--json", at[place]]
        yield f"decode --config {place}", [*good["decode"][:3], at[place], *good["decode"][4:]]
        yield f"step --model {place}", [*good["step"][:3], at[place], *good["step"][4:]]
    for command in ("train", "finetune"):
        yield f"{command} --resume", [*good[command], "--resume"]
        yield f"{command} --resume --overwrite", [*good[command], "--resume", "--overwrite"]
    for name in ("nothing", "lambada_openai:limit=x", ":", "a:b:c", ""):
        yield f"evaluate --tasks {name}", ["evaluate", at["sparse"], "--tasks", name, "--include-path", at["folder"]]
    for words in (
        ["--nope"],
        ["nosuch"],
        ["bench", "nosuch"],
        ["inspect"],
        ["generate", at["sparse"]],
        ["methods", "x"],
    ):
        yield " ".join(Path(word).name for word in words), words
    for place in places:
        yield f"init --config {place}", ["init", "--config", at[place], *good["init"][3:]]
        if place != "none":  # where a result may well be written
            yield f"evaluate --json {place}", [*good["evaluate"], "--json", at[place]]
        yield f"evaluate --baseline {place}", [*good["evaluate"], "--baseline", at[place]]
        yield f"evaluate --against {place}", [*good["evaluate"], "--against", at[place]]
    flags = {
        "evaluate": [
            "--sparsity",
            "--batch-size",
            "--context-length",
            "--stride",
            "--limit",
            "--max-new-tokens",
            "--seed",
        ],
        "calibrate": ["--target-sparsity", "--tokens", "--context-length", "--limit"],
        "quantize": ["--weights", "--group", "--head", "--coarse", "--bits-per-token", "--tokens", "--steps"],
        "generate": ["--max-new-tokens", "--temperature", "--seed"],
        "init": ["--vocab-size", "--seed"],
        "ffn": ["--d-model", "--d-ff", "--dtype", "--sparsity", "--tokens", "--expert-size", "--router", "--weights"],
        "prefill": ["--config", "--dtype", "--tokens", "--sparsity", "--rounds", "--method", "--expert-size"],
        "limit": ["--config", "--sparsity", "--expert-size", "--context"],
        "decode": [
            "--dtype",
            "--sparsity",
            "--batch",
            "--new-tokens",
            "--rounds",
            "--method",
            "--expert-size",
            "--threads",
        ],
        "step": ["--batch", "--context", "--rounds"],
        "sweep": ["--only", "--part"],
        "compare": ["--methods", "--sparsities", "--steps", "--dense-steps", "--seeds", "--decode-tokens", "--tasks"],
        "train": ["--target-sparsity", "--epochs", "--batch-size", "--learning-rate", "--expert-size", "--preset"],
    }
    for command, names in flags.items():
        for name in names:
            for value in ["nan", "inf", "-1", "0", "2", "x", "", "1e9"]:
                yield f"{command} {name} {value}", [*good[command], name, value]


GOOD = set((Path(__file__).parent / "no_mistake.txt").read_text().splitlines())
"""Cases that are no mistake, or one only a reader of the result can see."""


def digest(root: Path) -> dict[str, str]:
    """What is in the files that must not change."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "/scratch/" not in str(path)
    }


def outcome(words: list[str]) -> tuple[str, str]:
    """``refused``, ``accepted``, ``hang`` or ``exception``, and what was said: as a user sees it."""

    def stop(*_: Any) -> None:
        raise Hangs

    out, error, code = io.StringIO(), io.StringIO(), None
    before, sys.argv = sys.argv, ["lte", *words]
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(out), redirect_stderr(error):
            lte_start.main()
    except Hangs:
        return "hang", ""
    except SystemExit as left:
        code = left.code
    except Exception as other:  # noqa: BLE001 - what main let through
        return "exception", f"{type(other).__name__}: {other}"[:300]
    finally:
        signal.alarm(0)
        sys.argv = before
    lines = error.getvalue().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    if code in (None, 0, 3):  # 3: trained, and not at the target
        return "accepted", out.getvalue()[-200:]
    if "Traceback" in error.getvalue() or len(said) != 1 or lines[-1] != said[0]:
        return "exception", f"exit code {code}, not in one line: {error.getvalue()[-300:]}"
    for log in re.findall(r"the traceback is in (\S+),", said[0]):
        Path(log).unlink(missing_ok=True)
    return ("refused" if code == 2 or "out of memory" in said[0] else "exception"), said[0][:300]


def main() -> None:
    """Run the cases, print those that went wrong, write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="1/1", help="i/n")
    given = parser.parse_args()
    torch.set_num_threads(1)
    target = given.json and given.json.absolute()
    part, parts = map(int, given.part.split("/"))
    root = Path(tempfile.mkdtemp(prefix="lte-campaign-"))
    at = build(root)
    os.chdir(root)
    before, counts, wrong = digest(root), Counter[str](), list[str]()
    every = [case for case in cases(at) if given.pattern in case[0]]
    for name, words in every[part - 1 :: parts]:
        scratch = root / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        if "SPARSE" in words:
            shutil.copytree(at["sparse"], scratch / "sparse")
        places = {"OUT": str(scratch / "out"), "SPARSE": str(scratch / "sparse")}
        kind, said = outcome([places.get(word, word) for word in words])
        if kind == "accepted" and name in GOOD:
            kind = "no mistake"
        if (now := digest(root)) != before:
            wrong.append(f"LOST {name}: {sorted(set(before.items()) ^ set(now.items()))[:3]}")
            counts["lost"] += 1
            before = now
        counts[kind] += 1
        if kind not in ("refused", "no mistake"):
            wrong.append(f"{kind} {name}: {' '.join(said.split())}")
            print(wrong[-1], flush=True)
    print(dict(counts), file=sys.stderr)
    if target:
        target.write_text(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=2) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
