"""Language modelling on running text: documents packed into blocks, perplexity by a sliding window."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.errors import DataError
from lte.tasks.base import Run, TaskResult
from lte.tasks.collate import FEATURES, PaddingCollator, pad_id
from lte.tasks.columns import check_no_nulls, find_text
from lte.tasks.config import TaskConfig
from lte.tasks.scoring import perplexity_result, score_stream
from lte.tasks.sources import CONTINUES_COLUMN, quiet

# rows from .txt are up to 64 Ki characters long, and a batch is held in memory as lists of Python integers
_ROWS_PER_BATCH = 64

_BLOCK_FEATURES = Features({name: FEATURES[name] for name in ("input_ids", "labels")})


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by default."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a sequence starts with: BOS where the tokenizer adds it by default, else nothing."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without special tokens, and no warning where a text is longer than the context."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids


class DocumentEncoder:
    """Documents to one stream of ids: BOS if the tokenizer adds it by default, text, EOS if it has one.

    A document may come in several rows; its pieces are tokenised one by one, which can differ by a token
    where they meet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, column: str) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.bos = bos_ids(tokenizer)
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.rows = 0
        self.inside = False

    def encode(self, batch: dict[str, list[Any]]) -> list[int]:
        """The stream's next ids, from the next rows."""
        texts = batch[self.column]
        check_no_nulls(texts, self.column, self.rows)
        self.rows += len(texts)
        ids: list[int] = []
        pieces = encode_texts(self.tokenizer, texts)
        for piece, continues in zip(pieces, batch.get(CONTINUES_COLUMN, [False] * len(texts)), strict=True):
            if not piece and not self.inside:
                continue
            ids += piece if self.inside else self.bos + piece
            if not continues:
                ids += self.eos
            self.inside = continues
        return ids


class Packer:
    """Rows of text to blocks of ``context_length`` tokens; what does not fill one waits in ``rest``."""

    def __init__(self, encoder: DocumentEncoder, context_length: int) -> None:
        self.encoder = encoder
        self.context_length = context_length
        self.rest: list[int] = []

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """The next blocks, as columns of training rows."""
        ids = self.rest + self.encoder.encode(batch)
        used = len(ids) - len(ids) % self.context_length
        self.rest = ids[used:]
        blocks = [ids[start : start + self.context_length] for start in range(0, used, self.context_length)]
        return {"input_ids": blocks, "labels": blocks}


@dataclass(frozen=True)
class TextFormat:
    """Rows are running text; every token is learned and scored."""

    config: TaskConfig
    column: str

    @classmethod
    def of(cls, config: TaskConfig, rows: Dataset) -> TextFormat:
        """The format for these rows; DataError where no text column can be told."""
        return cls(config, find_text(rows, config.text_column))

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Blocks of exactly ``context_length`` tokens; the last incomplete one is dropped."""
        packer = Packer(DocumentEncoder(tokenizer, self.column), self.config.context_length)
        with quiet():
            blocks = rows.map(
                packer,
                batched=True,
                batch_size=_ROWS_PER_BATCH,
                remove_columns=rows.column_names,
                features=_BLOCK_FEATURES,
                load_from_cache_file=False,
            )
        if len(blocks) == 0:
            raise DataError(
                f"the text has {len(packer.rest)} tokens, fewer than one block of context_length="
                f"{self.config.context_length}; give more text or a smaller context_length"
            )
        return blocks

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, run: Run
    ) -> TaskResult:
        """Perplexity of the stream that :meth:`prepare` would cut into blocks, by a sliding window."""
        encoder = DocumentEncoder(tokenizer, self.column)
        stream = array("l")
        for batch in rows.iter(_ROWS_PER_BATCH):
            stream.extend(encoder.encode(batch))
        if len(stream) < 2:
            raise DataError(f"the text has {len(stream)} tokens; perplexity needs at least 2, give more text")
        loss, n_scored = score_stream(
            model,
            torch.tensor(stream),
            self.config.context_length,
            self.config.window_stride,
            PaddingCollator(pad_id(tokenizer)),
            run,
        )
        return perplexity_result(loss, n_scored, run.tokens)
