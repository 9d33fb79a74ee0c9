"""What must hold for any sparse model, whatever the family."""

from __future__ import annotations

import pytest
import torch

import lte
from tests import models

DECODERS = sorted(set(models.CONFIGS) - models.ENCODERS)


def sparse(name: str):
    model = lte.sparsify(
        models.build(name), lte.LTEConfig(expert_size=models.EXPERT, grouping="random", router_init="random")
    )
    models.spread_routers(model)
    return model


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(name):
    model, batch = sparse(name), models.inputs(3, 9)
    together = model(**batch).logits
    alone = torch.cat([model(**{key: value[i : i + 1] for key, value in batch.items()}).logits for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(name):
    model, ids = sparse(name), models.inputs(2, 9)["input_ids"]
    full = model(input_ids=ids).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)
