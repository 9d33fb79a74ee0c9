"""What a model is calibrated on."""

import pytest
from datasets import Dataset

import lte
from lte.calibration import sample_batches
from lte.errors import ConfigError
from lte.tasks.collate import PaddingCollator
from tests import models


def rows_of(lengths):
    """Rows whose first token is their number."""
    return Dataset.from_list(
        [{"input_ids": [i] * n, "attention_mask": [1] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    )


def test_a_sample_comes_from_all_over_the_data():
    batches = sample_batches(rows_of([10] * 100), PaddingCollator(0), 100, 4)
    assert sorted(int(i) for batch in batches for i in batch["input_ids"][:, 0]) == list(range(0, 100, 10))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]


def test_batches_hold_rows_of_similar_length():
    lengths = [5, 40, 7, 38, 6, 39, 8, 37]
    batches = sample_batches(rows_of(lengths), PaddingCollator(0), 10_000, 4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 8), (4, 40)]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(lengths)


def test_one_long_row_does_not_make_the_sample_small():
    batches = sample_batches(rows_of([300, *([10] * 2000)]), PaddingCollator(0), 8000, 8)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == pytest.approx(8000, rel=0.4)


def test_no_rows():
    with pytest.raises(ConfigError, match="no rows to calibrate on"):
        sample_batches([], PaddingCollator(0), 100)


def test_labels_of_which_none_counts():
    batch = models.inputs(2, 8)
    batch["labels"] = batch["input_ids"] * 0 - 100
    with pytest.raises(ConfigError, match="labels -100"):
        lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=models.EXPERT), calibration=[batch])
    useful = {**batch, "labels": batch["input_ids"]}
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=models.EXPERT), calibration=[batch, useful])
    assert 0 < lte.calibrate(model.eval(), [batch], 0.5).sparsity < 1
