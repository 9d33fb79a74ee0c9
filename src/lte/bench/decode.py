"""Decoding speed of models side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch


@torch.no_grad()
def decode_tokens_per_second(
    models: Mapping[str, Any], prompt_ids: torch.Tensor, *, new_tokens: int = 64, repeats: int = 3
) -> dict[str, float]:
    """Median tokens/s of ``generate``, batch 1, greedy, with the KV cache; models take turns within one run.

    Args:
        models: name -> model.
        prompt_ids: [1, S].
        new_tokens: tokens generated per repeat; the end-of-text token does not stop a model.
        repeats: timed rounds, after one that is not.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(repeats + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
            if prompt_ids.device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return {name: new_tokens / median(values) for name, values in times.items()}
