"""Watching a dense model work: what its FFNs see and do, and how much the loss depends on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.errors import ConfigError
from lte.grouping import Calibration
from lte.nn import Mode, SparseFFN, set_mode, sparse_ffns

PROBED_ROWS = 64
"""Rows from whose length the number of rows for some tokens is estimated."""


def sample_batches(
    rows: Any, collate: Callable[[list[Any]], Mapping[str, Tensor]], tokens: int, batch_size: int = 8
) -> list[Mapping[str, Tensor]]:
    """Some rows from all over a data set, in batches of similar length, until they hold about so many tokens.

    Args:
        rows: of a data set with a length.
        collate: rows to a batch of model inputs.
        tokens: wanted, padding left out.
        batch_size: rows of a batch.

    Raises:
        ConfigError: there are no rows.
    """
    if not len(rows):
        raise ConfigError("the data set has no rows to calibrate on; give one that has")
    probed = [_real_tokens(collate([row])) for row in _spread(rows, PROBED_ROWS)]
    chosen = _spread(rows, max(1, round(tokens * len(probed) / sum(probed))))
    chosen.sort(key=lambda row: _real_tokens(collate([row])))
    return [collate(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]


def _spread(rows: Any, count: int) -> list[Any]:
    count = min(len(rows), count)
    return [rows[index * len(rows) // count] for index in range(count)]


def _real_tokens(batch: Mapping[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())


def device_inputs(batch: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """A batch on a device, and the flat mask of its real tokens; None where all are."""
    inputs = {name: value.to(device) for name, value in batch.items()}
    mask = inputs.get("attention_mask")
    return inputs, None if mask is None else mask.flatten().bool()


def collect_calibration(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Calibration]:
    """Run the dense function of a sparsified model over some batches; one :class:`Calibration` per FFN.

    Args:
        model: with sparse FFNs, on any device; its modes are left at ``hard``.
        batches: model inputs. Where all have ``labels``, the sensitivity of the loss is measured too.

    Returns:
        In layer order, in the model's dtype on the CPU, padding left out.

    Raises:
        ConfigError: there are labels, and none of them counts.
    """
    ffns = sparse_ffns(model)
    watches = [_Watch() for _ in ffns]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    set_mode(model, Mode.DENSE)
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.callback(set_mode, model, Mode.HARD)
        stack.enter_context(_frozen(model))
        for ffn, watch in zip(ffns, watches, strict=True):
            stack.enter_context(ffn.register_forward_hook(watch))
        for batch in batches:
            inputs, keep = device_inputs(batch, device)
            with torch.set_grad_enabled("labels" in inputs):
                result = model(**inputs)
                gradients = _gradients(result.loss, watches) if "labels" in inputs else [None] * len(ffns)
            per_row = "labels" in inputs and inputs["labels"].dim() == 1
            for watch, gradient in zip(watches, gradients, strict=True):
                watch.keep(keep, gradient, len(inputs["labels"]) if per_row else 0)
    kept = [watch.calibration() for watch in watches]
    if all(each.sensitivity == 0 for each in kept):
        raise ConfigError(
            "the calibration batches' loss depends on no FFN: are all their labels -100, or masked? "
            "Give batches with labels that count, or none"
        )
    return kept


class _Watch:
    """Forward hook of one FFN."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.squares: list[float] = []
        self.of_tokens: list[Tensor] = []
        self.latest: tuple[Tensor, Tensor] | None = None
        self.output: Tensor | None = None

    def __call__(self, ffn: SparseFFN, args: tuple[Any, ...], output: Tensor) -> None:
        with torch.no_grad():
            self.latest = args[0].detach().flatten(0, -2), ffn.hidden(args[0]).flatten(0, -2)
        if torch.is_grad_enabled():
            self.output = output.requires_grad_(True)

    def keep(self, token_mask: Tensor | None, gradient: Tensor | None, rows: int) -> None:
        """Take over what the last forward left, for the tokens that count; ``rows`` is 0 for a label per token."""
        assert self.latest is not None
        x, hidden = (t if token_mask is None else t[token_mask] for t in self.latest)
        self.inputs.append(x.cpu())
        self.hidden.append(hidden.cpu())
        if gradient is not None:
            squares = gradient.float().square().sum(-1)
            self.squares.append(float(squares.mean()))
            if rows:  # the loss is a mean over them
                norms = rows * squares.flatten().sqrt()
                self.of_tokens.append((norms if token_mask is None else norms[token_mask]).cpu())
        self.latest = self.output = None

    def calibration(self) -> Calibration:
        """All that was kept."""
        sensitivity = None
        if len(self.squares) == len(self.inputs):
            known = [square for square in self.squares if math.isfinite(square)]
            sensitivity = (sum(known) / max(len(known), 1)) ** 0.5
        of_tokens = torch.cat(self.of_tokens) if len(self.of_tokens) == len(self.inputs) else None
        return Calibration(torch.cat(self.inputs), torch.cat(self.hidden), sensitivity, of_tokens)


def _gradients(loss: Tensor, watches: list[_Watch]) -> list[Tensor]:
    outputs = [watch.output for watch in watches if watch.output is not None]
    return list(torch.autograd.grad(loss, outputs))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters: those of the FFNs' outputs are all that is asked for."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
