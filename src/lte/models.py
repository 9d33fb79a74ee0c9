"""New small models with random weights and a tokenizer trained on the spot: for baselines and for the quickstart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lte.errors import ConfigError, DataError, check_seed
from lte.files import nothing_left
from lte.tasks import load_rows

EOS = "<|endoftext|>"

MOST_ENTRIES = 2**22
"""Of a tokenizer; the library that trains it takes memory for all beforehand."""


def create(
    config: dict[str, Any] | Path, data: str, out: Path, *, vocab_size: int = 4096, seed: int = 0
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Make a random model of any transformers family and a byte-level BPE tokenizer, and save both.

    Args:
        config: a transformers config as a mapping or JSON file, ``model_type`` included; vocabulary size and
            special tokens are filled in.
        data: text the tokenizer is trained on; every text column is used.
        out: folder to write to.
        vocab_size: entries of the tokenizer.
        seed: of the weights.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={str(out)!r} is a file, or a folder that is not empty; choose another")
    check_seed(seed)
    if not 0 < vocab_size <= MOST_ENTRIES:
        raise ConfigError(f"vocab_size={vocab_size} must be from 1 to {MOST_ENTRIES}")
    values = dict(config) if isinstance(config, dict) else _read_config(config)
    if "model_type" not in values:
        raise ConfigError("the model config has no 'model_type', for instance llama")
    tokenizer = train_tokenizer(_texts(data), vocab_size)
    end = tokenizer.eos_token_id
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ConfigError(f"model_type={model_type!r} is not one transformers knows, such as llama, gpt2 or opt")
    values.update(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=end)
    set_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the model config of type {model_type!r} cannot be used: {reason}") from error
    with nothing_left(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return model, tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, which ends and pads a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def _texts(data: str) -> Iterator[str]:
    rows = load_rows(data)
    columns = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise DataError(f"{data} has no text column to train a tokenizer on; columns: {', '.join(rows.column_names)}")
    for row in rows:
        yield from (row[column] for column in columns if row[column])


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no model config file {str(path)!r}")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping: keys with values")
    return values
