"""Padding of rows to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label that no loss is taken on; the value transformers ignores."""

FEATURES = Features({name: List(Value("int32")) for name in ("input_ids", "attention_mask", "labels")})
"""Columns of tokenised rows, told to ``map`` because a batch that yields no row has no types to read off."""


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token to pad with: the tokenizer's own, else EOS, else 0; the attention mask hides it in any case."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


@dataclass(frozen=True)
class PaddingCollator:
    """Rows to one batch of tensors, padded to the longest row; without attention_mask all tokens are real.

    Args:
        pad_id: token id of padding.
        side: where the padding goes.
    """

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """[B, S] tensors of the columns that are lists (long), [B] tensors of those that are numbers."""
        fills = {"input_ids": self.pad_id, "labels": IGNORED}
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        columns.setdefault("attention_mask", [[1] * len(row["input_ids"]) for row in rows])
        return {
            key: self._pad(values, fills.get(key, 0)) if isinstance(values[0], list) else torch.tensor(values)
            for key, values in columns.items()
        }

    def _pad(self, lists: list[list[int]], fill: int) -> Tensor:
        length = max(len(values) for values in lists)
        padding = [[fill] * (length - len(values)) for values in lists]
        if self.side == "left":
            return torch.tensor([pad + values for pad, values in zip(padding, lists, strict=True)])
        return torch.tensor([values + pad for pad, values in zip(padding, lists, strict=True)])
