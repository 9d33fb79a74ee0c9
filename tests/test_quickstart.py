from __future__ import annotations

import json

import pytest
from rich.console import Console

import lte
from lte import quickstart
from lte.errors import ConfigError


@pytest.fixture
def small(monkeypatch):
    """The whole quickstart with a model and a number of steps that take seconds."""
    settings = {
        "MODEL": {**quickstart.MODEL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        "VOCAB_SIZE": 300,
        "CONTEXT": 32,
        "BATCH": 4,
        "PRETRAINING_STEPS": 3,
        "STEPS": 2,
        "TRAIN_BYTES": 60_000,
        "VALIDATION_BYTES": 6_000,
    }
    for name, value in settings.items():
        monkeypatch.setattr(quickstart, name, value)


@pytest.mark.slow
def test_quickstart_leaves_model_figure_and_numbers(small, tmp_path):
    out = tmp_path / "quickstart"
    console = Console(record=True, width=100)
    quickstart.quickstart(out, overwrite=False, seed=0, console=console)
    record = json.loads((out / "quickstart.json").read_text())
    for side in ("dense", "sparse"):
        assert record[side].keys() >= {
            "loss",
            "perplexity",
            "sparsity",
            "gflops_per_token",
            "bytes_per_token",
            "tokens_per_s",
        }
    assert record["dense"]["sparsity"] == 0
    assert "validation loss" in console.export_text()
    assert (out / "quickstart.png").stat().st_size > 10_000
    lte.load(out / "sparse")
    with pytest.raises(ConfigError, match="is not empty; use --overwrite"):
        quickstart.quickstart(out, overwrite=False, seed=0, console=console)


def test_corpus_is_split_by_file_and_follows_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "TRAIN_BYTES", 50_000)
    monkeypatch.setattr(quickstart, "VALIDATION_BYTES", 5_000)
    texts = [
        {name: path.read_text() for name, path in quickstart.write_corpus(tmp_path / str(i), seed=seed).items()}
        for i, seed in enumerate((0, 0, 1))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]["train"]) == 50_000
    assert texts[0]["validation"][:2000] not in texts[0]["train"]


@pytest.mark.parametrize("theirs", ["mine.txt", "data/train.txt"])
def test_a_folder_of_somebody_else_is_not_overwritten(tmp_path, theirs):
    file = tmp_path / theirs
    file.parent.mkdir(exist_ok=True)
    file.write_text("keep")
    with pytest.raises(ConfigError, match="was not made by the quickstart"):
        quickstart.quickstart(tmp_path, overwrite=True, seed=0, console=Console())
    assert file.read_text() == "keep"


def test_what_is_overwritten_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    out = tmp_path / "out"
    quickstart._claim(out, False)
    quickstart.unlock_folder(out)
    (out / quickstart.RESULT).write_text("the first")

    def fail(*args, **kwargs):
        raise RuntimeError("no text")

    monkeypatch.setattr(quickstart, "write_corpus", fail)
    for _ in range(2):  # the second finds what the first left
        with pytest.raises(RuntimeError, match="no text"):
            quickstart.quickstart(out, overwrite=True, seed=0, console=Console())
        quickstart.unlock_folder(out)
        assert (tmp_path / "out.replaced" / quickstart.RESULT).read_text() == "the first"
