"""Well-known tasks by name: settings of :class:`lte.tasks.TaskConfig` under which rows are read and scored as usual."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A task by name.

    Attributes:
        kind: the task it is a case of, ``lm`` or ``classify``.
        about: in a few words.
        metric: the main number, see :class:`lte.tasks.TaskConfig`; ``perplexity`` of text and chats.
        settings: what it sets besides; flags and recipes win over it.
    """

    kind: str
    about: str
    metric: str
    settings: dict[str, Any] = field(default_factory=dict)

    def expand(self) -> dict[str, Any]:
        """As settings of a task."""
        metric = {} if self.metric == "perplexity" else {"metric": self.metric}
        return {"name": self.kind, **metric, **self.settings}


def _glue(about: str, metric: str, first: str, second: str | None = None) -> Preset:
    pair = {} if second is None else {"text_pair_column": second}
    return Preset("classify", about, metric, {"text_column": first, **pair})


PRESETS: dict[str, Preset] = {
    "cola": _glue("GLUE: is the sentence English?", "matthews", "sentence"),
    "sst2": _glue("GLUE: is the review good?", "accuracy", "sentence"),
    "mrpc": _glue("GLUE: do two sentences say the same?", "f1", "sentence1", "sentence2"),
    "qqp": _glue("GLUE: do two questions ask the same?", "f1", "question1", "question2"),
    "stsb": _glue("GLUE: how alike are two sentences, 0 to 5?", "pearson", "sentence1", "sentence2"),
    "mnli": _glue("GLUE: does the premise imply, contradict or neither?", "accuracy", "premise", "hypothesis"),
    "qnli": _glue("GLUE: does the sentence answer the question?", "accuracy", "question", "sentence"),
    "rte": _glue("GLUE: does the first sentence imply the second?", "accuracy", "sentence1", "sentence2"),
    "e2e": Preset(
        "lm",
        "a meaning representation in words",
        "rougeL",
        {"prompt_column": "meaning_representation", "target_column": "human_reference"},
    ),
    "xsum": Preset(
        "lm",
        "an article in one sentence",
        "rougeL",
        {
            "prompt_column": "document",
            "target_column": "summary",
            "keep_prompt": "start",
            "context_length": 1024,
            "max_new_tokens": 60,
        },
    ),
    "instruct": Preset(
        "lm",
        "instructions followed, as in Alpaca's data",
        "rougeL",
        {"prompt_column": "instruction", "input_column": "input", "target_column": "output"},
    ),
}
"""Name -> the task."""
