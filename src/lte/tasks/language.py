"""Language modelling on text, on prompt -> target pairs and on chats."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lte.tasks.base import Run, Task, TaskResult
from lte.tasks.chat import ChatFormat
from lte.tasks.config import TaskConfig
from lte.tasks.prompts import PromptFormat
from lte.tasks.sources import Source
from lte.tasks.text import TextFormat


def choose_format(config: TaskConfig, rows: Dataset) -> TextFormat | PromptFormat | ChatFormat:
    """What the rows are.

    Prompt -> target if the config names these columns; chats if it names a column of messages or, with no
    text column named, the data has one called ``messages``; else text.
    """
    if config.prompt_column is not None and config.target_column is not None:
        return PromptFormat.of(config, rows, config.prompt_column, config.target_column)
    if config.messages_column is not None or (config.text_column is None and "messages" in rows.column_names):
        return ChatFormat.of(config, rows)
    return TextFormat.of(config, rows)


class LanguageTask(Task):
    """Causal language modelling; :func:`choose_format` says on what.

    Text: packed blocks; perplexity by a sliding window. Prompt -> target: loss on the target; ROUGE-L of
    greedy generation. Chat: loss on, and perplexity of, the assistant's tokens.
    """

    auto_class = AutoModelForCausalLM
    predicts_tokens = True

    def prepare(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Training rows with input_ids and labels, and attention_mask unless they are packed text."""
        rows = self.rows(source)
        return choose_format(self.config, rows).prepare(rows, tokenizer)

    def _measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        config: TaskConfig,
        run: Run,
    ) -> TaskResult:
        return choose_format(config, rows).evaluate(model, tokenizer, rows, run)
