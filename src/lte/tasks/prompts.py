"""Prompt -> target rows: the loss is on the target, the metrics are ROUGE-L and BLEU of greedy generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lte.errors import ConfigError, LTEError
from lte.tasks.base import MAX_SAMPLES, Run, TaskResult
from lte.tasks.collate import FEATURES, IGNORED, PaddingCollator, pad_id
from lte.tasks.columns import check_no_nulls, require_text
from lte.tasks.config import TaskConfig
from lte.tasks.scoring import score_rows, to_device
from lte.tasks.sources import quiet
from lte.tasks.text import bos_ids, encode_texts

SEPARATOR = "\n"
"""The template: BOS (where the tokenizer adds it by default), prompt, this, target, EOS. Prompt and target
are tokenised apart, so that the tokens before the target are the same in training and in generation."""


@dataclass
class Example:
    """One prompt with all its references."""

    prompt: str
    references: list[str]


@dataclass(frozen=True)
class PromptFormat:
    """Rows are a prompt, perhaps an input to it, and a target; consecutive rows of one prompt are one example."""

    config: TaskConfig
    prompt_column: str
    target_column: str

    @classmethod
    def of(cls, config: TaskConfig, rows: Dataset, prompt_column: str, target_column: str) -> PromptFormat:
        """The format for these rows; DataError where a column is missing, has gaps or is no text."""
        named = {"prompt_column": prompt_column, "target_column": target_column}
        if config.input_column is not None:
            named["input_column"] = config.input_column
        for setting, name in named.items():
            require_text(rows, name, setting)
            check_no_nulls(rows[name][:], name)
        return cls(config, prompt_column, target_column)

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """One row per pair, at most ``context_length`` tokens; the labels of the prompt are ignored."""

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            encoded = self.encode(self.prompts(batch), batch[self.target_column], tokenizer)
            return {key: [row[key] for row in encoded] for key in FEATURES}

        with quiet():
            return rows.map(
                encode,
                batched=True,
                remove_columns=rows.column_names,
                features=FEATURES,
                load_from_cache_file=False,
            )

    def prompts(self, rows: Mapping[str, Any]) -> list[str]:
        """The prompts of some rows, each with its input where it has one."""
        prompts = list(rows[self.prompt_column])
        if self.config.input_column is None:
            return prompts
        inputs = rows[self.config.input_column]
        return [SEPARATOR.join(filter(None, pair)) for pair in zip(prompts, inputs, strict=True)]

    def encode(
        self, prompts: Sequence[str], targets: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, list[int]]]:
        """Training rows of some pairs; too long ones lose of the prompt first, then the target's end."""
        eos = _eos_id(tokenizer)
        longest_target = self.config.context_length - max(1, len(bos_ids(tokenizer)))
        rows = []
        target_ids = [[*ids, eos][:longest_target] for ids in encode_texts(tokenizer, targets)]
        rooms = [self.config.context_length - len(ids) for ids in target_ids]
        for prompt, target in zip(self.prompt_ids(prompts, rooms, tokenizer), target_ids, strict=True):
            ids = prompt + target
            labels = [IGNORED] * len(prompt) + target
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return rows

    def prompt_ids(
        self, prompts: Sequence[str], rooms: Sequence[int], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        """BOS, prompt and separator, each prompt cut to its room; BOS and separator stay."""
        bos = bos_ids(tokenizer)
        encoded = encode_texts(tokenizer, [prompt + SEPARATOR for prompt in prompts])
        kept = len(encode_texts(tokenizer, [SEPARATOR])[0]) if self.config.keep_prompt == "start" else 0
        rows = []
        for ids, room in zip(encoded, rooms, strict=True):
            too_long = max(0, len(ids) + len(bos) - room)
            first = max(0, len(ids) - kept - too_long) if kept else 0
            rows.append(bos + ids[:first] + ids[first + too_long :])
        return rows

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, run: Run
    ) -> TaskResult:
        """ROUGE-L, the mean F-measure, best over an example's references; BLEU of the corpus, with all of them.

        Beside these is the first reference's cross-entropy.

        The statistics see one forward over the prompt and the answer generated for it, EOS left out because
        the model is never run on it; they see neither the generation itself nor the reference.
        """
        scorer = _rouge_scorer()
        examples = group_examples(self.prompts(rows[:]), rows[self.target_column][:])
        run.total = 2 * run.n_batches(len(examples))
        answers = self._generate(model, tokenizer, [example.prompt for example in examples], run)
        predictions = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        scores = [
            scorer.score_multi(example.references, prediction)["rougeL"].fmeasure
            for example, prediction in zip(examples, predictions, strict=True)
        ]
        first_references = [example.references[0] for example in examples]
        encoded = self.encode([example.prompt for example in examples], first_references, tokenizer)
        loss, n_scored = score_rows(model, encoded, PaddingCollator(pad_id(tokenizer)), run, counted=False)
        samples = [
            {"prompt": example.prompt, "prediction": prediction, "references": example.references}
            for example, prediction in zip(examples[:MAX_SAMPLES], predictions, strict=False)
        ]
        metrics = {"rougeL": sum(scores) / len(scores), "bleu": _bleu(predictions, examples)}
        metric = self.config.metric or "rougeL"
        extras = {"cross_entropy": loss / n_scored, "examples": float(len(examples))}
        return TaskResult(metric, metrics.pop(metric), run.tokens, {**metrics, **extras}, samples)

    def _generate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], run: Run
    ) -> list[list[int]]:
        """Generated ids before EOS, in the order of the prompts; see :meth:`evaluate` for what is counted."""
        room = self.config.context_length - self.config.max_new_tokens
        if room < 2:
            raise ConfigError(
                f"max_new_tokens={self.config.max_new_tokens} leaves no room for a prompt in context_length="
                f"{self.config.context_length}; lower max_new_tokens or raise context_length"
            )
        prompt_ids = self.prompt_ids(prompts, [room] * len(prompts), tokenizer)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompt_ids[index]), reverse=True)
        answers: list[list[int]] = [[] for _ in prompts]
        for indices in run.batches(by_length):
            batch_ids = [prompt_ids[index] for index in indices]
            run.count(False)
            batch_answers = generate_greedily(model, tokenizer, batch_ids, self.config.max_new_tokens)
            self._count(model, tokenizer, batch_ids, batch_answers, run)
            for index, answer in zip(indices, batch_answers, strict=True):
                answers[index] = answer
        return answers

    @staticmethod
    def _count(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        answers: list[list[int]],
        run: Run,
    ) -> None:
        rows = [{"input_ids": prompt + answer} for prompt, answer in zip(prompts, answers, strict=True)]
        batch = to_device(PaddingCollator(pad_id(tokenizer))(rows), model.device)
        run.count(batch["attention_mask"].bool())
        model(**batch, use_cache=False)


def group_examples(prompts: Sequence[str], targets: Sequence[str]) -> list[Example]:
    """Consecutive pairs of the same prompt as one example with several references."""
    groups = groupby(zip(prompts, targets, strict=True), key=lambda pair: pair[0])
    return [Example(prompt, [target for _, target in group]) for prompt, group in groups]


def generate_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt, as ids before EOS; the batch is padded on the left."""
    eos = _eos_id(tokenizer)
    batch = PaddingCollator(pad_id(tokenizer), side="left")([{"input_ids": ids} for ids in prompts])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=pad_id(tokenizer),
    )
    # a config given to generate() is filled up from the checkpoint's, which may penalise repetition, for one
    of_checkpoint, model.generation_config = model.generation_config, settings
    try:
        output: Tensor = model.generate(**to_device(batch, model.device))
    finally:
        model.generation_config = of_checkpoint
    return [_before(ids, eos) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]


def _before(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos_token, so the end of a target cannot be learned or recognised; "
            "set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def _rouge_scorer() -> Any:
    try:
        import sacrebleu as _  # noqa: F401 - looked for before anything is generated
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise LTEError(f"ROUGE and BLEU need {error.name}; pip install 'learn-to-be-efficient[eval]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def _bleu(predictions: list[str], examples: Sequence[Example]) -> float:
    """BLEU of a corpus as sacrebleu has it, as a share; examples may have different numbers of references."""
    from sacrebleu.metrics import BLEU

    streams = zip_longest(*(example.references for example in examples))
    return float(BLEU().corpus_score(predictions, [list(stream) for stream in streams]).score) / 100
