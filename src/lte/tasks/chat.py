"""Chat rows: the loss is on what the assistant says, its end-of-turn token included."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.errors import DataError
from lte.tasks.base import Run, TaskResult
from lte.tasks.collate import FEATURES, IGNORED, PaddingCollator, pad_id
from lte.tasks.columns import require_column
from lte.tasks.config import TaskConfig
from lte.tasks.scoring import perplexity_result, score_rows
from lte.tasks.sources import quiet
from lte.tasks.text import adds_bos

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

DEFAULT_TEMPLATE = (
    "{% if add_bos %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}:\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
)
"""For tokenizers without a chat template: ``User:``, a line break, the text, an empty line, for each message;
the assistant's text is followed by EOS."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class ChatFormat:
    """Rows are conversations: lists of ``{"role", "content"}``."""

    config: TaskConfig
    column: str

    @classmethod
    def of(cls, config: TaskConfig, rows: Dataset) -> ChatFormat:
        """The format for these rows; DataError where the column is missing."""
        return cls(config, require_column(rows, config.messages_column or "messages", "messages_column"))

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """One row per conversation, its end cut off after ``context_length`` tokens.

        Conversations in which nothing of the assistant is left are dropped, and their number is logged.
        """

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
            pairs = zip(indices, batch[self.column], strict=True)
            encoded = [self._encode(messages, index, tokenizer) for index, messages in pairs]
            kept = [row for row in encoded if any(label != IGNORED for label in row["labels"])]
            return {key: [row[key] for row in kept] for key in FEATURES}

        with quiet():
            prepared = rows.map(
                encode,
                batched=True,
                with_indices=True,
                remove_columns=rows.column_names,
                features=FEATURES,
                load_from_cache_file=False,
            )
        if len(prepared) == 0:
            raise DataError(
                f"none of the {len(rows)} conversations has an assistant's turn within context_length="
                f"{self.config.context_length} tokens; give other rows or a larger context_length"
            )
        if len(prepared) < len(rows):
            logger.warning(
                "left out %d of %d conversations: no assistant's turn within context_length=%d tokens",
                len(rows) - len(prepared),
                len(rows),
                self.config.context_length,
            )
        return prepared

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, run: Run
    ) -> TaskResult:
        """Perplexity of the assistant's tokens; all real tokens count in the statistics."""
        prepared = self.prepare(rows, tokenizer).to_list()
        run.total = run.n_batches(len(prepared))
        loss, n_scored = score_rows(model, prepared, PaddingCollator(pad_id(tokenizer)), run, counted=True)
        return perplexity_result(loss, n_scored, run.tokens)

    def _encode(self, messages: Any, row: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        messages = _checked(messages, row, self.column)
        try:
            ids, said = encode_chat(messages, tokenizer)
        except (DataError, jinja2.TemplateError) as error:
            raise DataError(f"row {row}: the chat template cannot take these messages: {error}") from None
        ids, said = ids[: self.config.context_length], said[: self.config.context_length]
        labels = [token if is_said else IGNORED for token, is_said in zip(ids, said, strict=True)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    A template that marks what the assistant generates is believed. For any other one the turns are found by
    rendering the messages before and up to each of them. Without a template it is :data:`DEFAULT_TEMPLATE`.
    """
    extra: dict[str, Any] = {}
    if tokenizer.chat_template is None:
        extra = {"chat_template": DEFAULT_TEMPLATE, "add_bos": adds_bos(tokenizer)}
    elif _GENERATION_MARK.search(tokenizer.get_chat_template()) is None:
        return _encode_unmarked(messages, tokenizer)
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **extra
    )
    return encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]


def _encode_unmarked(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    text = _render(messages, tokenizer)
    spans = [
        _turn_span(messages, index, text, tokenizer)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a token that straddles the border holds the assistant's first letters, so it has to be learned
    said = [
        any(start < span_end and end > span_start for span_start, span_end in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], said


def _turn_span(messages: Messages, index: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Characters of ``text``, the whole conversation rendered, that the assistant says in one turn."""
    before = _render(messages[:index], tokenizer) if index else ""
    prompt = _render(messages[:index], tokenizer, prompt=True) if index else ""
    upto = _render(messages[: index + 1], tokenizer)
    # some templates put more into the generation prompt, such as a reasoning tag, than into a finished turn
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, upto, strict=False)))
    if start < len(before) or not text.startswith(upto):
        raise DataError(
            f"message {index} is rendered differently when others follow it, so the assistant's words cannot "
            "be told from the rest; use a template with {% generation %} marks"
        )
    return start, _end_of_turn(upto, tokenizer)


def _end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the turn that ends ``text`` stops being said: after its end-of-turn token, if it has one."""
    trimmed = text.rstrip()
    special = tuple(tokenizer.get_added_vocab())
    return len(trimmed) if special and trimmed.endswith(special) else len(text)


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _checked(messages: Any, row: int, column: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"row {row}: {column} must be a list of messages, got {messages!r}")
    for message in messages:
        parts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"row {row}: a message of {column} needs a role and a content, got {message!r}")
    return messages
