"""Two processes with half a batch each train to the weights of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_cli import folder  # noqa: F401 - a fixture
from tests.training.common import rows, sparse_model, trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.training.ddp_worker", str(tmp_path)]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    together = load_file(tmp_path / "final" / "model.safetensors")
    run = trainer(tmp_path / "one", sparse_model(), rows(padded=True), eta=2.0, per_device_train_batch_size=4)
    run.train()
    alone = run.model.state_dict()
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.slow
def test_two_processes_overwrite_a_folder_once(tmp_path, folder):  # noqa: F811
    out = tmp_path / "out"
    words = ["finetune", "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--out", out]
    words += ["--context-length", "16", "--set", "training.max_steps=2", "--set", "training.save_strategy=no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "lte_start", *map(str, words)]
    assert subprocess.run(alone, env=environment, capture_output=True, check=False).returncode == 0
    (out / "of the first run").touch()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lte_start"]
    done = subprocess.run(
        [*command, *map(str, words), "--overwrite"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model.safetensors").is_file()
    assert not (out / "of the first run").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert len((out / "training_log.jsonl").read_text().splitlines()) == 3  # two steps and the end, once
