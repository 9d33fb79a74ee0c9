"""What a model is calibrated on."""

import pytest
import torch
from datasets import Dataset

import lte
from lte.activations import LOSS_ROWS, sample_batches, stream_activations
from lte.errors import ConfigError
from lte.methods.scores import squares_along
from lte.nn import sparse_ffns
from lte.tasks.collate import PaddingCollator
from tests import models


def rows_of(lengths):
    """Rows whose first token is their number."""
    return Dataset.from_list(
        [{"input_ids": [i] * n, "attention_mask": [1] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    )


def test_a_sample_comes_from_all_over_the_data():
    batches = sample_batches(rows_of([10] * 100), PaddingCollator(0), 100)
    assert sorted(int(i) for batch in batches for i in batch["input_ids"][:, 0]) == list(range(0, 100, 10))


def test_batches_are_bounded_in_tokens():
    batches = sample_batches(rows_of([200] * 7 + [900]), PaddingCollator(0), 10_000)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 200)] * 3 + [(1, 200), (1, 900)]


def test_batches_hold_rows_of_similar_length():
    lengths = [50, 250, 57, 248, 56, 249, 58, 247]
    batches = sample_batches(rows_of(lengths), PaddingCollator(0), 10_000)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 58), (2, 248), (2, 250)]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(lengths)


def test_one_long_row_does_not_make_the_sample_small():
    batches = sample_batches(rows_of([300, *([10] * 2000)]), PaddingCollator(0), 8000)
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


def test_with_a_label_per_row_tokens_have_sensitivities_of_their_own():
    """Nothing of the last layer but its first token reaches a classifier's label."""
    model = lte.sparsify(
        models.build("bert"), lte.LTEConfig(expert_size=models.EXPERT, grouping="random", router_init="random")
    )
    batch = models.inputs(4, 10) | {"labels": torch.tensor([0, 1, 1, 0])}
    batch["attention_mask"][0, 6:] = 0
    last = list(stream_activations(model, [batch]))[-1]
    first_tokens = torch.tensor([0, 6, 16, 26])
    others = torch.ones(36, dtype=torch.bool).index_fill(0, first_tokens, False)
    assert (last.token_sensitivity_T[first_tokens] > 0).all()
    assert (last.token_sensitivity_T[others] == 0).all()
    in_halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    split = list(stream_activations(model, in_halves))[-1]
    torch.testing.assert_close(split.token_sensitivity_T, last.token_sensitivity_T, rtol=1e-4, atol=1e-7)


def test_with_a_label_per_token_they_have_not():
    model = lte.sparsify(
        models.build("llama"), lte.LTEConfig(expert_size=models.EXPERT, grouping="random", router_init="random")
    )
    batch = models.inputs(4, 10)
    assert all(seen.token_sensitivity_T is None for seen in stream_activations(model, [batch]))
    batch["labels"] = batch["input_ids"]
    assert all(seen.token_sensitivity_T is None for seen in stream_activations(model, [batch]))


def test_the_loss_in_parts_has_the_gradient_of_the_whole():
    model = lte.sparsify(
        models.build("llama"), lte.LTEConfig(expert_size=models.EXPERT, grouping="random", router_init="random")
    )
    batch = models.inputs(4, 50)
    assert batch["input_ids"].numel() > LOSS_ROWS
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(50) % 7 == 0, -100)
    every = list(stream_activations(model, [batch], squares_along))
    found = [seen.sensitivity for seen in every]
    lte.set_mode(model, "dense")
    outputs = []
    for ffn in sparse_ffns(model):
        ffn.register_forward_hook(lambda ffn, args, output: (output.retain_grad(), outputs.append(output))[0])
    model.eval()(**batch).loss.backward()
    wanted = [float(output.grad.square().sum(-1).mean().sqrt()) for output in outputs]
    assert found == pytest.approx(wanted, rel=1e-4)
    for seen, ffn, output in zip(every, sparse_ffns(model), outputs, strict=True):
        rows = ffn.weights().down.detach()
        along_F = (output.grad.flatten(0, 1) @ (rows / rows.norm(dim=1, keepdim=True)).T).square().mean(0)
        torch.testing.assert_close(seen.neuron_gradients_F, models.D_MODEL * along_F, rtol=1e-3, atol=0.0)


def test_sensitivities_stay_with_their_neurons():
    batch = models.inputs(4, 20)
    batch["labels"] = batch["input_ids"]
    plain, shuffled = (
        lte.sparsify(models.build("llama"), lte.SelfPredictionConfig(grouping=grouping), calibration=[batch])
        for grouping in ("none", "random")
    )
    for one, other in zip(sparse_ffns(plain), sparse_ffns(shuffled), strict=True):
        place = torch.cdist(other.weights().down, one.weights().down).argmin(1)
        assert not torch.equal(place, torch.arange(models.D_FF))
        torch.testing.assert_close(other.router.sensitivity, one.router.sensitivity[place], rtol=1e-3, atol=0.0)
