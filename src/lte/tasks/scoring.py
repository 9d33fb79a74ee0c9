"""Cross-entropy of chosen tokens, and the sliding window over a long stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lte.tasks.base import Run, TaskResult
from lte.tasks.beside import Beside
from lte.tasks.collate import IGNORED, PaddingCollator


def scored_loss(model: PreTrainedModel, batch: dict[str, Tensor], beside: Beside | None = None) -> tuple[float, int]:
    """Summed cross-entropy in nats of the tokens whose label is not ignored, and their number.

    Args:
        model: a causal language model.
        batch: input_ids, attention_mask and labels, [B, S] each, on the model's device; ``labels[b, s]`` is
            predicted from the tokens before ``s``.
        beside: compares these predictions with another model's.
    """
    wanted_BSV = None if beside is None else beside.logits(batch)
    logits_BSV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = []
    # Row by row: choosing, casting and the softmax each copy what they are given, and a batch's logits take gigabytes.
    for row, (logits_SV, labels_S) in enumerate(zip(logits_BSV[:, :-1], batch["labels"][:, 1:], strict=True)):
        scored = labels_S != IGNORED
        if beside is not None and wanted_BSV is not None:
            beside.add(logits_SV[scored], wanted_BSV[row, :-1][scored.to(wanted_BSV.device)])
        losses.append(F.cross_entropy(logits_SV[scored].float(), labels_S[scored], reduction="none"))
    every = torch.cat(losses)
    return every.cpu().double().sum().item(), every.numel()


def perplexity_result(loss: float, n_scored: int, tokens: int) -> TaskResult:
    """Perplexity and cross-entropy from a summed loss."""
    cross_entropy = loss / n_scored
    # math.exp raises above this, and a diverged model is a result, not an error
    value = math.exp(cross_entropy) if cross_entropy < 700 else math.inf
    return TaskResult("perplexity", value, tokens, {"cross_entropy": cross_entropy})


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    collate: PaddingCollator,
    run: Run,
    *,
    counted: bool,
) -> tuple[float, int]:
    """Summed loss and number of labelled tokens of tokenised rows.

    Args:
        model: a causal language model.
        rows: with input_ids and labels; the longest are run together.
        collate: makes the batches.
        run: of the evaluation.
        counted: whether the real tokens of the rows count in the statistics.
    """
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    loss, n_scored = 0.0, 0
    for items in run.batches(ordered):
        batch = to_device(collate(items), model.device)
        run.count(batch["attention_mask"].bool() if counted else False)
        batch_loss, batch_scored = scored_loss(model, batch, run.beside)
        loss += batch_loss
        n_scored += batch_scored
    return loss, n_scored


def window_spans(n_tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first new token) of the windows over a stream; each token is new in exactly one window.

    Every window but the last is ``length`` long and begins ``stride`` after the one before it.
    """
    spans = [(0, min(length, n_tokens), 0)]
    while spans[-1][1] < n_tokens:
        begin, end, _ = spans[-1]
        spans.append((begin + stride, min(begin + stride + length, n_tokens), end))
    return spans


def score_stream(
    model: PreTrainedModel, stream: Tensor, length: int, stride: int, collate: PaddingCollator, run: Run
) -> tuple[float, int]:
    """Summed loss and number of scored tokens of one stream, by a sliding window.

    Every token but the stream's first, which has no context, is scored exactly once; every token counts in
    the statistics exactly once.

    Args:
        model: a causal language model.
        stream: [N] token ids.
        length, stride: of the windows; stride < length.
        collate: makes the batches.
        run: of the evaluation.
    """
    spans = window_spans(len(stream), length, stride)
    run.total = run.n_batches(len(spans))
    loss, n_scored = 0.0, 0
    for items in run.batches(spans):
        rows = [_window_row(stream, *span) for span in items]
        batch = to_device(collate(rows), model.device)
        run.count(batch.pop("new").bool())
        batch_loss, batch_scored = scored_loss(model, batch, run.beside)
        loss += batch_loss
        n_scored += batch_scored
    return loss, n_scored


def _window_row(stream: Tensor, begin: int, end: int, first_new: int) -> dict[str, list[int]]:
    ids = stream[begin:end].tolist()
    old = first_new - begin
    return {
        "input_ids": ids,
        "labels": [IGNORED] * old + ids[old:],
        "new": [0] * old + [1] * (len(ids) - old),
    }


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {key: value.to(device) for key, value in batch.items()}
