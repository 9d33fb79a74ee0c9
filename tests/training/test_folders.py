"""What a run does to the folder it writes to: nothing is lost, and two runs do not write to one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lte import run_folder, runs
from lte.errors import ConfigError, LTEError
from lte.files import LOCK, lock_folder, unlock_folder, write_whole
from lte.models import create
from lte.recipe import parse_recipe
from tests.locks import held_elsewhere
from tests.test_cli import folder  # noqa: F401 - a fixture


@pytest.fixture
def recipe(folder, tmp_path):  # noqa: F811
    def make(seed: int = 0, **training):
        values = {
            "model": str(folder / "dense"),
            "data": str(folder / "text.txt"),
            "out": str(tmp_path / "out"),
            "seed": seed,
            "task": {"name": "lm", "context_length": 16},
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, **training},
        }
        return parse_recipe(values)

    return make


def test_what_is_overwritten_is_there_until_the_new_run_is_complete(recipe, tmp_path, monkeypatch):
    runs.finetune(recipe())
    out, kept = tmp_path / "out", tmp_path / "out.replaced"
    before = (out / "model.safetensors").read_bytes()

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_save", fail)
        with pytest.raises(MemoryError):
            runs.finetune(recipe(seed=1), overwrite=True)
    assert (kept / "model.safetensors").read_bytes() == before
    unlock_folder(out)
    runs.finetune(recipe(seed=1), overwrite=True)  # over the run that failed: what it was to replace stays till then
    assert not kept.exists()
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (out / LOCK).exists()


def test_settings_that_are_wrong_leave_everything_as_it_is(recipe, tmp_path):
    runs.finetune(recipe())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    wrong = recipe()
    wrong.data = str(tmp_path / "nothing.txt")
    with pytest.raises(LTEError):
        runs.finetune(wrong, overwrite=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked by fcntl")
@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}])
def test_a_folder_that_another_run_writes_to_is_refused(recipe, tmp_path, how):
    runs.finetune(recipe())
    out = tmp_path / "out"
    (out / run_folder.RUN_FILE).unlink()  # as if it were running
    before = json.dumps(sorted(path.name for path in out.iterdir()))
    with (
        held_elsewhere(out / LOCK) as owner,
        pytest.raises(ConfigError, match=f"is being written to by process {owner} on"),
    ):
        runs.finetune(recipe(), **how)
    assert json.dumps(sorted(path.name for path in out.iterdir() if path.name != LOCK)) == before
    assert runs.finetune(recipe(), **how)["steps"] == 2  # whose owner is dead is free


def test_a_run_that_fails_lets_others_write(recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(runs, "_save", fail)
    with pytest.raises(MemoryError):
        runs.finetune(recipe())
    assert not (tmp_path / "out" / LOCK).exists()


def test_what_a_run_reads_is_not_what_it_would_clear_away(recipe, tmp_path):
    runs.finetune(recipe())
    (tmp_path / "out").rename(tmp_path / "out.replaced")  # as a run leaves it that was killed
    again = recipe()
    again.model = str(tmp_path / "out.replaced")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="which the run reads"):
        runs.finetune(again)
    assert (tmp_path / "out.replaced" / "model.safetensors").is_file()


def test_a_folder_of_somebody_else_is_not_cleared_away(recipe, tmp_path):
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "mine.txt").write_text("keep")
    runs.finetune(recipe())
    with pytest.raises(ConfigError, match="is in the way of what --overwrite keeps there"):
        runs.finetune(recipe(), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "out.replaced").iterdir()] == ["mine.txt"]


def test_the_folder_one_is_in(recipe, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    here = recipe()
    here.out = "."
    assert runs.finetune(here)["steps"] == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_lock_is_of_one_folder_and_one_process(tmp_path):
    assert lock_folder(tmp_path) is None
    assert lock_folder(tmp_path) is None
    unlock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_killed_after_its_last_step_takes_no_other(recipe, tmp_path, monkeypatch):
    runs.finetune(recipe(save_steps=1))
    out = tmp_path / "out"
    before = (out / "model.safetensors").read_bytes()
    (out / run_folder.RUN_FILE).unlink()
    (out / "model.safetensors").unlink()
    assert runs.finetune(recipe(save_steps=1), resume=True)["steps"] == 2
    assert (out / "model.safetensors").read_bytes() == before


def test_a_disk_that_is_full_is_said_in_one_line_and_leaves_what_was_there(folder, recipe, tmp_path):  # noqa: F811
    """No file may become larger than a checkpoint: what `python -m tests.campaign.full_disk` does with a disk."""
    runs.finetune(recipe())
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); import signal; "
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from lte.cli import main; main()"
    words = ["sparsify", "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--overwrite"]
    words += ["--context-length", "16", "--target-sparsity", "0.4", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: there is no space left to write to; what was complete stays as it is") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_disk_that_is_full_leaves_no_folder(recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lte.files.os.write", full)  # of who holds the folder
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        runs.finetune(recipe())
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "result.json").write_bytes(b"{}")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "kept" / "result.json", "[]")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["result.json"]


def test_a_new_model_that_is_not_whole_leaves_no_folder(folder, tmp_path, monkeypatch):  # noqa: F811
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(OSError, match="No space left"):
        create(config, str(folder / "text.txt"), tmp_path / "new", vocab_size=300)
    assert not (tmp_path / "new").exists()
