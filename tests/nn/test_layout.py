from __future__ import annotations

import copy

import torch

import lte
from lte.nn import set_mode, sparse_ffns
from tests import models
from tests.training.common import sparse_model


def test_running_a_model_between_steps_does_not_disturb_its_optimiser():
    whole, watched = (sparse_model("gpt2", router_init_score=0.5) for _ in range(2))
    for model, look in ((whole, False), (watched, True)):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        batch = models.inputs(2, 8)
        for _ in range(4):
            model.train()
            set_mode(model, "straight-through")
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if look:
                set_mode(model, "hard")
                with torch.no_grad():
                    model.eval()(**models.inputs(1, 1))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_a_trained_model_is_laid_out_when_it_is_prepared():
    model = sparse_model("llama", router_init_score=0.5).train()
    batch = models.inputs(2, 8)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.eval()
    expected = copy.deepcopy(model)
    lte.prepare_for_inference(model)
    assert all(ffn.weights().down.stride(1) == 1 for ffn in sparse_ffns(model))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, atol=1e-5, rtol=1e-5)
