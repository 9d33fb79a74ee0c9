"""On a pretrained language model, whose massive activations no toy has: routers' start, and the tracker."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

import lte
from lte.nn import observe_routing
from lte.quickstart import write_corpus
from lte.training import trainer as module
from tests.smollm2 import needs_gguf, needs_smollm2, smollm2_file
from tests.training.common import collate, trainer

pytestmark = [pytest.mark.slow, needs_gguf, needs_smollm2]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The sparse model, rows of 128 tokens, and batches of them."""
    file = smollm2_file()
    text = write_corpus(tmp_path_factory.mktemp("corpus") / "text", seed=0)["train"].read_text()
    ids = torch.tensor(lte.load_tokenizer(str(file))(text[:30000])["input_ids"])[: 32 * 128].view(-1, 128)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    data = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": ids.tolist()}
    rows = Dataset.from_dict(data).with_format("torch")
    batches = [collate([rows[index], rows[index + 1]]) for index in range(24, 32, 2)]
    config = lte.LTEConfig(grouping="random")  # what is tested here does not depend on the grouping
    return lte.sparsify(lte.load_dense(str(file)), config, calibration=batches), rows.select(range(16)), batches


def test_routers_start_with_scores_that_are_spread_in_every_layer(smollm2):
    """One standard deviation over all layers, of norms, gave quartiles 0.17 logits apart: outliers owned it."""
    model, _, batches = smollm2
    margins = {}
    with torch.no_grad(), observe_routing(model, lambda layer, routing: margins.update({layer: routing.margins})):
        model.eval()(**batches[0])
    quartiles = [torch.quantile(found.flatten()[:50000], torch.tensor([0.25, 0.75])) for found in margins.values()]
    assert all(1 < float(high - low) < 10 for low, high in quartiles)
    every = torch.cat([found.flatten()[:50000] for found in margins.values()])
    low, high = torch.quantile(every[:: len(every) // 500000 + 1], torch.tensor([0.25, 0.75]))
    assert float(high - low) == pytest.approx(2.7, rel=0.25)


def test_every_step_is_held_in_the_band(smollm2, tmp_path, monkeypatch):
    model, rows, _ = smollm2
    monkeypatch.setattr(module, "DIAL_TOKENS", 256)
    monkeypatch.setattr(module, "OPENING_TOKENS", 256)
    rates = {"learning_rate": 1.5e-4, "router_learning_rate": 5e-5, "per_device_train_batch_size": 2}
    run = trainer(
        tmp_path, model, rows, stages=1, max_steps=8, target_sparsity=0.5, warmup_steps=1, lambda_sep=0.0, **rates
    )
    run.train()
    readings = [record["sparsity"] for record in run.state.log_history if "sparsity" in record]
    assert len(readings) == 8
    assert run.tracker.strays == 0
    assert all(abs(reading - 0.5) < 0.08 for reading in readings[1:])
    losses = [record["task_loss"] for record in run.state.log_history if "task_loss" in record]
    assert losses[-1] < losses[1]
