"""Settings of a task, and how its context length is fitted to a model."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from lte.config import explain
from lte.errors import ConfigError
from lte.tasks.presets import PRESETS

logger = logging.getLogger(__name__)

_LM_ONLY = ("stride", "prompt_column", "input_column", "target_column", "messages_column")

METRICS = {
    "classify": ("accuracy", "f1", "matthews", "pearson", "spearman"),
    "prompt -> target": ("rougeL", "bleu"),
}
"""What the main number may be, by what is measured; text and chats have their perplexity."""


class TaskConfig(pydantic.BaseModel):
    """What a model is trained and evaluated on; ConfigError for an unknown or contradicting setting.

    Attributes:
        name: ``lm`` (text, prompt -> target, or chat) or ``classify``; or one of :data:`lte.tasks.PRESETS`, for its
            settings.
        context_length: tokens per packed block, per evaluation window, and longest row.
        stride: tokens by which evaluation windows move; by default half of ``context_length``.
        prompt_column, target_column: given together, rows are prompt -> target.
        input_column: text that follows the prompt on a line of its own, where a row has it.
        keep_prompt: which end of a prompt stays where it is too long, ``start`` (an article's news) or ``end`` (what a
            dialogue has come to; the default).
        text_column: by default ``text`` or the only string column; for ``classify`` GLUE's names.
        text_pair_column: second text of ``classify``.
        label_column: of ``classify``; integers, strings, or floats (regression).
        messages_column: chat rows; by default ``messages`` where the data has it.
        split: of a folder or a hub dataset.
        limit: rows to use, from the first.
        max_new_tokens: longest generated answer of prompt -> target.
        metric: the main number. Of classes ``accuracy`` (the default), ``f1`` (of class 1 of two) or ``matthews``; of
            labels that are numbers ``pearson`` (the default) or ``spearman``; of prompt -> target ``rougeL`` (the
            default) or ``bleu``. The others are beside it.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: Literal["lm", "classify"]
    context_length: int = Field(512, ge=2)
    stride: Annotated[int, Field(strict=True, ge=1)] | None = None
    prompt_column: str | None = None
    input_column: str | None = None
    keep_prompt: Literal["start", "end"] = "end"
    target_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str = "label"
    messages_column: str | None = None
    split: str | None = None
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_new_tokens: int = Field(100, ge=1)
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "rougeL", "bleu"] | None = None

    def __init__(self, **values: Any) -> None:
        if isinstance(name := values.get("name"), str) and name not in ("lm", "classify"):
            values = {**_preset(name), **{key: value for key, value in values.items() if key != "name"}}
        # pydantic would wrap a ConfigError of a validator in its own many-line error
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise explain(error, type(self), "task") from None
        self._check_together()

    @property
    def window_stride(self) -> int:
        """Tokens by which evaluation windows move."""
        return self.stride if self.stride is not None else self.context_length // 2

    def _check_together(self) -> None:
        if self.stride is not None and self.stride >= self.context_length:
            raise ConfigError(
                f"stride={self.stride} must be below context_length={self.context_length}, or the first "
                f"token of a window would have no context; choose at most {self.context_length - 1}"
            )
        if (self.prompt_column is None) != (self.target_column is None):
            given, missing = "prompt_column", "target_column"
            if self.prompt_column is None:
                given, missing = missing, given
            raise ConfigError(f"{given}={getattr(self, given)!r} needs {missing}; give both or neither")
        if self.name == "classify":
            self._refuse_together("name='classify'", _LM_ONLY)
            if self.text_pair_column is not None and self.text_column is None:
                raise ConfigError(f"text_pair_column={self.text_pair_column!r} needs text_column; give both")
        else:
            self._refuse_together("name='lm'", ("text_pair_column",))
        if self.prompt_column is not None:
            self._refuse_together("prompt_column", ("text_column", "messages_column"))
        elif self.input_column is not None:
            raise ConfigError(f"input_column={self.input_column!r} needs prompt_column and target_column; give all")
        kind = self.name if self.prompt_column is None else "prompt -> target"
        if self.metric is not None and self.metric not in METRICS.get(kind, ()):
            known = f"one of {', '.join(METRICS[kind])}" if kind in METRICS else "perplexity; leave it out"
            raise ConfigError(f"metric={self.metric!r} is not of this task, {kind}: its metric is {known}")
        if self.messages_column is not None:
            self._refuse_together("messages_column", ("text_column",))

    def _refuse_together(self, reason: str, unused: tuple[str, ...]) -> None:
        for key in unused:
            if getattr(self, key) is not None:
                value = getattr(self, key)
                raise ConfigError(f"{key}={value!r} is not used together with {reason}; leave it out")


def _preset(name: str) -> dict[str, Any]:
    """Settings of a task by name; ConfigError lists the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown task {name!r}; known tasks: lm, classify, {', '.join(PRESETS)} (see lte tasks)")
    return PRESETS[name].expand()


def fit_context(config: TaskConfig, model_config: Any) -> TaskConfig:
    """The config, ``context_length`` and ``stride`` clipped, with a logged line, to the model's positions.

    Args:
        config: of the task.
        model_config: a transformers config; one that names no number of positions clips nothing.
    """
    positions = model_positions(model_config)
    if positions is None or config.context_length <= positions:
        return config
    logger.warning(
        "context_length=%d is more than the model's %d positions; using %d",
        config.context_length,
        positions,
        positions,
    )
    changes: dict[str, Any] = {"context_length": positions}
    if config.stride is not None and config.stride >= positions:
        changes["stride"] = positions // 2
        logger.warning("stride=%d does not fit either; using %d", config.stride, positions // 2)
    return TaskConfig(**{**config.model_dump(), **changes})


def model_positions(model_config: Any) -> int | None:
    """Longest input the model has positions for; None where its config sets no limit."""
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    if "roberta" in text_config.model_type or text_config.model_type == "camembert":
        # these number their positions from pad_token_id + 1
        return int(positions - text_config.pad_token_id - 1)
    return int(positions)
