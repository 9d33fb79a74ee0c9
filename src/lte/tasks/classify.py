"""Classification and regression of one text or a pair of texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lte.errors import ConfigError, DataError
from lte.tasks.base import Run, Task, TaskResult
from lte.tasks.collate import pad_id
from lte.tasks.columns import check_no_nulls, find_text, require_column, require_text, string_columns
from lte.tasks.config import TaskConfig
from lte.tasks.scoring import to_device
from lte.tasks.sources import Source, quiet

logger = logging.getLogger(__name__)

GLUE_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
)
"""Text columns of the GLUE tasks, in the order of the search."""


@dataclass(frozen=True)
class Labels:
    """What a label column can hold: named classes, or, with no names, any number."""

    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to be met."""
        return not self.names

    @classmethod
    def of(cls, rows: Dataset, column: str) -> Labels:
        """Read off a label column: integers are class numbers, strings are sorted, floats mean regression."""
        require_column(rows, column, "label_column")
        values = rows[column][:]
        _check_labels(values, column)
        if isinstance(values[0], float):
            return cls(())
        if isinstance(values[0], str):
            names = tuple(sorted(set(values)))
        elif isinstance(rows.features[column], ClassLabel):
            names = tuple(rows.features[column].names)
        else:
            names = tuple(str(number) for number in range(max(values) + 1))
        if len(names) < 2:
            raise DataError(f"column {column!r} holds only {values[0]!r}; classification needs two different labels")
        return cls(names)

    def encode(self, values: list[Any], column: str) -> list[int] | list[float]:
        """Labels as the model takes them; DataError for one that is not known."""
        _check_labels(values, column)
        if self.regression:
            if isinstance(values[0], str):
                raise DataError(f"column {column!r} holds text, but the model does regression; give numbers")
            return [float(value) for value in values]
        if isinstance(values[0], float):
            raise DataError(f"column {column!r} holds floats, but the model is for the classes {', '.join(self.names)}")
        if isinstance(values[0], str):
            known = {name: number for number, name in enumerate(self.names)}
            numbers = [known.get(value, -1) for value in values]
        else:
            numbers = [int(value) if value < len(self.names) else -1 for value in values]
        if -1 in numbers:
            unknown = values[numbers.index(-1)]
            raise DataError(
                f"label {unknown!r} of column {column!r} is not one of the {len(self.names)} classes: "
                f"{', '.join(self.names)}"
            )
        return numbers


class ClassifyTask(Task):
    """Sequence classification, accuracy and F1; or regression where the labels are floats, correlations.

    The classes are those of the first data that :meth:`model_kwargs` or :meth:`prepare` sees, the training
    data; :meth:`evaluate` takes them from the model.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self._labels: Labels | None = None

    def model_kwargs(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The classes, the kind of problem, and the padding token by which a decoder finds the end."""
        labels = self._training_labels(self.rows(source))
        common = {"pad_token_id": pad_id(tokenizer)}
        if labels.regression:
            return {"num_labels": 1, "problem_type": "regression", **common}
        return {
            "num_labels": len(labels.names),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels.names)),
            "label2id": {name: number for number, name in enumerate(labels.names)},
            **common,
        }

    def prepare(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Training rows, at most ``context_length`` tokens each."""
        rows = self.rows(source)
        return encode_rows(rows, self._training_labels(rows), self.config, tokenizer)

    def _training_labels(self, rows: Dataset) -> Labels:
        if self._labels is None:
            self._labels = Labels.of(rows, self.config.label_column)
        return self._labels

    def _measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        config: TaskConfig,
        run: Run,
    ) -> TaskResult:
        labels = _labels_of_model(model)
        _check_metric(config.metric, labels)
        encoded = encode_rows(rows, labels, config, tokenizer).to_list()
        encoded.sort(key=lambda row: len(row["input_ids"]), reverse=True)
        run.total = run.n_batches(len(encoded))
        collate = self.collator(tokenizer)
        logits = []
        for items in run.batches(encoded):
            batch = to_device(collate(items), model.device)
            batch.pop("labels")
            run.count(batch["attention_mask"].bool())
            logits.append(model(**batch).logits.float().cpu())
        targets = torch.tensor([row["labels"] for row in encoded])
        return _result(torch.cat(logits), targets, labels, config.metric, run.tokens)


def text_columns(config: TaskConfig, rows: Dataset) -> list[str]:
    """The one or two columns of text: those of the config, else GLUE's, else the only column of strings."""
    if config.text_column is not None:
        names = [require_text(rows, config.text_column, "text_column")]
        if config.text_pair_column is not None:
            names.append(require_text(rows, config.text_pair_column, "text_pair_column"))
        return names
    available = set(string_columns(rows))
    for columns in GLUE_COLUMNS:
        if available.issuperset(columns):
            return list(columns)
    return [find_text(rows, None, ignore=(config.label_column,))]


def encode_rows(rows: Dataset, labels: Labels, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenised rows with labels as numbers."""
    names = text_columns(config, rows)
    require_column(rows, config.label_column, "label_column")
    for name in names:
        check_no_nulls(rows[name][:], name)
    targets = labels.encode(rows[config.label_column][:], config.label_column)

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        encoded = tokenizer(*(batch[name] for name in names), truncation=True, max_length=config.context_length)
        return {**encoded, "labels": [targets[index] for index in indices]}

    with quiet():
        return rows.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0, with a logged line, where one side is constant and it is not defined."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        logger.warning("Pearson's correlation is not defined for constant values; reported as 0")
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of ranks, equal values sharing theirs."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: list[float] = (np.cumsum(counts) - (counts - 1) / 2)[which].tolist()
    return ranks


def f1(predictions: Sequence[int], targets: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where neither side has any."""
    both = sum(p == t == 1 for p, t in zip(predictions, targets, strict=True))
    either = sum(p == 1 for p in predictions) + sum(t == 1 for t in targets)
    return 2 * both / either if either else 0.0


def _result(logits: torch.Tensor, targets: torch.Tensor, labels: Labels, metric: str | None, tokens: int) -> TaskResult:
    """The main metric, and beside it the others that go with the labels, and the loss."""
    if labels.regression:
        predictions = logits.squeeze(-1).double()
        loss = F.mse_loss(predictions, targets.double()).item()
        both = predictions.tolist(), targets.tolist()
        metrics = {"pearson": pearson(*both), "spearman": spearman(*both)}
    else:
        loss = F.cross_entropy(logits.double(), targets).item()
        chosen = logits.argmax(-1)
        metrics = {"accuracy": (chosen == targets).double().mean().item()}
        if len(labels.names) == 2:
            both = chosen.tolist(), targets.tolist()
            # Of two classes it is Pearson's.
            metrics |= {"f1": f1(*both), "matthews": pearson(*both)}
    metric = metric or next(iter(metrics))
    return TaskResult(metric, metrics.pop(metric), tokens, {**metrics, "loss": loss})


def _check_metric(metric: str | None, labels: Labels) -> None:
    of_numbers, of_two = ("pearson", "spearman"), ("f1", "matthews")
    if metric is None:
        return
    if labels.regression != (metric in of_numbers) or (metric in of_two and len(labels.names) != 2):
        kind = "numbers" if labels.regression else f"{len(labels.names)} classes"
        raise ConfigError(f"metric={metric!r} is not for labels that are {kind}; leave it out for the default")


def _labels_of_model(model: PreTrainedModel) -> Labels:
    config = model.config
    if config.problem_type == "regression" or config.num_labels == 1:
        return Labels(())
    return Labels(tuple(config.id2label[number] for number in range(config.num_labels)))


def _check_labels(values: list[Any], column: str) -> None:
    check_no_nulls(values, column)
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"column {column!r} mixes labels of the types {names}; give one type")
    if not isinstance(values[0], (int, float, str)):
        raise DataError(f"column {column!r} holds {values[0]!r}; labels are integers, strings or floats")
    if isinstance(values[0], int) and min(values) < 0:
        raise DataError(
            f"row {values.index(min(values))} has the label {min(values)} in column {column!r}, which in "
            "GLUE marks rows without a label (its test splits); use a split with labels"
        )
