"""What every task can do: load its rows, make training rows, evaluate a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.errors import ConfigError
from lte.tasks.beside import Beside
from lte.tasks.collate import PaddingCollator, pad_id
from lte.tasks.config import TaskConfig, fit_context
from lte.tasks.sources import Source, load_rows

T = TypeVar("T")

SetTokenMask = Callable[[Tensor | Literal[False]], None]
"""Called before each forward: [B, S] bool, True for the tokens that count; False where none of them do."""

Progress = Callable[[int, int], None]
"""Called after each batch with the number of batches done and in total."""

MAX_SAMPLES = 10
"""Predictions kept in a result."""


@dataclass(frozen=True)
class TaskResult:
    """Outcome of an evaluation.

    Attributes:
        metric: name of the main number: perplexity, or one of :data:`lte.tasks.config.METRICS`.
        value: the main number; all but the perplexity as shares, not per cent.
        tokens: tokens that were announced to ``set_token_mask``.
        extras: further numbers.
        samples: up to ten ``{"prompt", "prediction", "references"}``, where text is generated.
    """

    metric: str
    value: float
    tokens: int
    extras: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """The running side of one evaluation: batch size, token counting, progress."""

    batch_size: int
    set_token_mask: SetTokenMask
    progress: Progress | None = None
    total: int = 0
    done: int = 0
    tokens: int = 0
    beside: Beside | None = None

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Slices of ``batch_size`` items; each counts as done when the next one is asked for."""
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)

    def n_batches(self, n_items: int) -> int:
        """Number of batches that ``n_items`` make."""
        return -(-n_items // self.batch_size)

    def count(self, mask_BS: Tensor | Literal[False]) -> None:
        """Announce which tokens of the next forward count; False: none."""
        self.set_token_mask(mask_BS)
        if isinstance(mask_BS, Tensor):
            self.tokens += int(mask_BS.sum())


class Task(ABC):
    """Data and metric of one kind of task; see the subclasses.

    Attributes:
        auto_class: the transformers class that loads a model for the task.
        predicts_tokens: whether what a model predicts of tokens is scored, and can be compared with another's.
    """

    auto_class: ClassVar[Any]
    predicts_tokens: ClassVar[bool] = False

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def rows(self, source: Source) -> Dataset:
        """The raw rows of a source, under the config's split and limit."""
        return load_rows(source, self.config.split, self.config.limit)

    def model_kwargs(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the training data says about the model: keywords for ``from_pretrained``."""
        return {}

    @abstractmethod
    def prepare(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokenised training rows, for :meth:`collator`."""

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
        """Makes batches of prepared rows, padded on the right to the longest of the batch."""
        return PaddingCollator(pad_id(tokenizer))

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        *,
        batch_size: int,
        set_token_mask: SetTokenMask,
        progress: Progress | None = None,
        seed: int = 0,
        against: PreTrainedModel | None = None,
    ) -> TaskResult:
        """Measure the model; its training mode and the global random state are left as they were.

        Args:
            model: on any device.
            tokenizer: of the model.
            source: see :func:`lte.tasks.load_rows`.
            batch_size: windows, prompts or rows per forward; does not change the result.
            set_token_mask: see :data:`SetTokenMask`; told False when all is done.
            progress: see :data:`Progress`.
            seed: of torch's generators; the tasks draw nothing, a model may.
            against: another model, whose predictions these are compared with: ``kl_divergence`` and ``same_top`` among
                the extras.

        Raises:
            ConfigError: a task that predicts no tokens, or a model of other tokens, to compare with.
        """
        if against is not None and not self.predicts_tokens:
            raise ConfigError(
                f"task={self.config.name!r} predicts no tokens that could be compared with another model's"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        config = fit_context(self.config, model.config)
        rows = self.rows(source)
        run = Run(batch_size, set_token_mask, progress)
        run.beside = None if against is None else Beside(against.eval(), model)
        was_training = model.training
        model.eval()
        cuda = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=cuda):
                torch.manual_seed(seed)
                result = self._measure(model, tokenizer, rows, config, run)
        finally:
            set_token_mask(False)
            model.train(was_training)
        if run.beside is None:
            return result
        return replace(result, extras={**result.extras, **run.beside.numbers()})

    @abstractmethod
    def _measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        config: TaskConfig,
        run: Run,
    ) -> TaskResult:
        """The task's own part of :meth:`evaluate`."""
