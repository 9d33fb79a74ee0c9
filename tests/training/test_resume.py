"""kill -9 in each stage, resume, and end at the very weights of a run that was never interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lte.errors import CheckpointError
from lte.training import check_checkpoint, last_complete_checkpoint

ROOT = Path(__file__).parents[2]


def start(out: Path, seconds: float, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.worker", str(out), str(seconds), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(process: subprocess.Popen[str]) -> list[int]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith("step ")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole")
    assert finish(start(out, 0)) == list(range(1, 13))
    return load_file(out / "final" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [3, 6, 9], ids=["stage-1", "at-the-switch", "stage-2"])
def test_killed_run_resumes_to_the_same_weights(tmp_path, uninterrupted, kill_at):
    process = start(tmp_path, 0.5)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == f"step {kill_at + 1}":
            process.kill()
            break
    process.wait()
    assert process.returncode == -9
    assert not (tmp_path / "final").exists()

    steps = finish(start(tmp_path, 0, "resume"))
    assert steps[0] == kill_at - kill_at % 2 + 1
    resumed = load_file(tmp_path / "final" / "model.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, caplog):
    states = {2: '{"global_step": 2}', 10: '{"global_step": 10}', 11: "{}", 12: '{"global_step": 1', 13: "[]", 14: None}
    for step, state in {**states, 15: '{"global_step": 14}'}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-16").mkdir()
    (tmp_path / "checkpoint-16" / "trainer_state.json").write_bytes(b"\xff")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    for step in range(11, 17):
        assert f"checkpoint-{step} is incomplete" in caplog.text
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_of_another_format_is_not_gone_on_from(tmp_path):
    entry = {"quant_method": "lte", "format_version": 1, "lte_version": "0.0.9"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": entry}))
    with pytest.raises(CheckpointError, match="is of format 1, and this version of lte goes on from 2; end that"):
        check_checkpoint(tmp_path)
