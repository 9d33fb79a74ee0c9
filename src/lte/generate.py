"""Text from a prompt, with a sparse checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch

from lte.errors import ConfigError, check_seed
from lte.hub import default_device, load, load_tokenizer
from lte.inference import prepare_for_inference
from lte.tasks import model_positions

COLDEST = 1e-3
"""Below it, logits divided by the temperature are no numbers any more."""


def generate_text(path: str, prompt: str, *, max_new_tokens: int = 100, temperature: float = 0.0, seed: int = 0) -> str:
    """Load a sparse model and continue ``prompt``; the prompt is part of the answer."""
    check_seed(seed)
    if not (temperature == 0 or COLDEST <= temperature < math.inf):
        raise ConfigError(f"temperature={temperature} must be 0, for the likeliest token, or from {COLDEST} up")
    model = load(path)
    if not model.can_generate():
        raise ConfigError(f"{path} is a {type(model).__name__}, which does not generate text")
    return continue_text(
        prepare_for_inference(model.to(default_device())),
        load_tokenizer(path),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes of it; temperature 0 is greedy."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty; give at least one token")
    positions, length = model_positions(model.config), inputs["input_ids"].shape[1]
    if positions is not None and length + max_new_tokens > positions:
        raise ConfigError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} exceed the model's {positions} "
            f"positions; ask for at most {positions - length} new tokens"
        )
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text
