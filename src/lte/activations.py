"""Watching a dense model work: what its FFNs see, and how much the loss depends on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from lte.errors import ConfigError
from lte.grouping import Activations, NeuronGradients
from lte.memory import trim_heap
from lte.nn import Mode, SparseFFN, set_mode, sparse_ffns

PROBED_ROWS = 64
"""Rows from whose length the number of rows for some tokens is estimated."""

BATCH_TOKENS = 512
"""Most tokens of a batch, padding included, unless one row is longer: a batch's logits are what takes memory."""

MOST_PADDED, SHORT = 1.25, 4
"""A batch's longest row has at most so many times the tokens of its shortest, and so many more."""

LOSS_ROWS = 128
"""Rows of logits for which a loss is computed at a time."""

INPUTS_BYTES = 448 * 2**20
"""Most memory for the inputs of FFNs; where those of all layers take more, the model is run again for the others."""


def sample_batches(
    rows: Any, collate: Callable[[list[Any]], Mapping[str, Tensor]], tokens: int
) -> list[Mapping[str, Tensor]]:
    """Some rows from all over a data set, in batches of similar length, until they hold about so many tokens.

    Args:
        rows: of a data set with a length.
        collate: rows to a batch of model inputs.
        tokens: wanted, padding left out.

    Raises:
        ConfigError: there are no rows.
    """
    if not len(rows):
        raise ConfigError("the data set has no rows to calibrate on; give one that has")
    probed = [_real_tokens(collate([row])) for row in _spread(rows, PROBED_ROWS)]
    chosen = _spread(rows, max(1, round(tokens * len(probed) / sum(probed))))
    lengths = {id(row): _real_tokens(collate([row])) for row in chosen}
    chosen.sort(key=lambda row: lengths[id(row)])
    batches: list[list[Any]] = [[]]
    for row in chosen:
        length, batch = lengths[id(row)], batches[-1]
        if batch and ((len(batch) + 1) * length > BATCH_TOKENS or length > MOST_PADDED * lengths[id(batch[0])] + SHORT):
            batches.append([])
        batches[-1].append(row)
    return [collate(batch) for batch in batches]


def every_nth(batches: Sequence[Mapping[str, Tensor]], tokens: int) -> list[Mapping[str, Tensor]]:
    """Batches from all over a sample, short rows and long ones, until they hold about so many tokens."""
    count = min(len(batches), max(1, round(len(batches) * tokens / max(token_count(batches), 1))))
    return [batches[(2 * index + 1) * len(batches) // (2 * count)] for index in range(count)]


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


def stream_activations(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    neuron_gradients: NeuronGradients | None = None,
    *,
    in_sequence: bool = False,
) -> Iterator[Activations]:
    """Run the dense function of a sparsified model over some batches; one :class:`Activations` per FFN, in order.

    What is held at a time are the inputs of as many FFNs as fit :data:`INPUTS_BYTES`; the model runs once for each such
    set of layers, the first time forward and backward. Let go of what one saw before asking for the next.

    Args:
        model: with sparse FFNs, on any device. Between two calibrations its neurons may be permuted.
        batches: model inputs. Where all have ``labels``, the sensitivity of the loss is measured too.
        neuron_gradients: what is measured for every neuron, besides.
        in_sequence: the model runs for every FFN, once that one is asked for: with what was done to those before it.

    Raises:
        ConfigError: there are labels, and none of them counts.
    """
    ffns = sparse_ffns(model)
    first = next(model.parameters())
    layer_bytes = max(1, token_count(batches) * ffns[0].weights().d_model * first.element_size())
    at_once = 1 if in_sequence else max(1, INPUTS_BYTES // layer_bytes)
    gradients = _Gradients(len(ffns), neuron_gradients) if all("labels" in batch for batch in batches) else None
    for start in range(0, len(ffns), at_once):
        watched = ffns[start : start + at_once]
        inputs = _watch(model, watched, batches, gradients if start == 0 else None)
        if gradients is not None and gradients.all_zero():
            raise ConfigError(
                "the calibration batches' loss depends on no FFN: are all their labels -100, or masked? "
                "Give batches with labels that count, or none"
            )
        for ffn in watched:
            known = () if gradients is None else gradients.of(ffn.layer_index)
            yield Activations(inputs.pop(ffn.layer_index), ffn.hidden, *known)


def _watch(
    model: nn.Module,
    watched: Sequence[SparseFFN],
    batches: Sequence[Mapping[str, Tensor]],
    gradients: _Gradients | None,
) -> dict[int, Tensor]:
    """The inputs of some FFNs over all batches, by layer; with ``gradients`` backward as well, for all layers."""
    kept: dict[int, list[Tensor]] = {ffn.layer_index: [] for ffn in watched}
    device = next(model.parameters()).device
    token_mask: Tensor | None = None

    def keep(ffn: SparseFFN, args: tuple[Any, ...], output: Tensor) -> None:
        if gradients is not None and gradients.backward:
            return  # a checkpointed layer is run a second time
        x_TD = args[0].detach().flatten(0, -2)
        kept[ffn.layer_index].append(x_TD if token_mask is None else x_TD[token_mask])
        trim_heap(device)
        if gradients is None and ffn is watched[-1]:
            raise _SeenEnough

    with _as_dense(model) as stack:
        for ffn in watched:
            stack.enter_context(ffn.register_forward_hook(keep))
        if gradients is not None:
            stack.enter_context(_checkpointed(model))
            stack.enter_context(_loss_in_parts(model))
            for ffn in sparse_ffns(model):
                stack.enter_context(ffn.register_forward_hook(gradients.watch))
        for batch in batches:
            inputs, token_mask = device_inputs(batch, device)
            if gradients is None:
                inputs.pop("labels", None)
                with torch.no_grad(), suppress(_SeenEnough):
                    body_of(model)(**inputs)
            else:
                with torch.enable_grad():
                    gradients.take(model(**inputs).loss, inputs["labels"], token_mask)
    return {layer: torch.cat(kept.pop(layer)) for layer in list(kept)}


class BlockRun:
    """A transformer block with its inputs, to be run again and again.

    Attributes:
        real_T: while it runs, which of the tokens of a batch are no padding, flat; None where all are.

    Args:
        block: of a model; the output of its FFN is in the mode that the FFN is in.
        calls: its arguments, by position and by name, of every batch.
        real: of every batch, see ``real_T``.
    """

    def __init__(self, block: nn.Module, calls: list[_Call], real: Sequence[Tensor | None]) -> None:
        self.block, self.calls, self.real = block, calls, real
        self.real_T: Tensor | None = None

    def __call__(self, tokens: int | None = None) -> Tensor:
        """Outputs, [T, D], of the tokens that are no padding; of so many tokens' worth of rows, or of all."""
        return torch.cat([self.without_padding(out.flatten(0, -2)) for out in self.outputs(tokens)])

    def without_padding(self, values_TD: Tensor) -> Tensor:
        """Of what the running batch has for every token, that of the tokens that count."""
        return values_TD if self.real_T is None else values_TD[self.real_T]

    @torch.no_grad()
    def outputs(self, tokens: int | None = None) -> Iterator[Tensor]:
        """The same batch by batch, [B, S, D], padding among them."""
        training, left = self.block.training, math.inf if tokens is None else tokens
        self.block.eval()
        try:
            for (args, kwargs), real_T in zip(self.calls, self.real, strict=True):
                if left <= 0:
                    break
                self.real_T = real_T
                out = self.block(*args, **kwargs)
                out_BSD = out[0] if isinstance(out, tuple) else out
                left -= out_BSD.shape[:-1].numel()
                yield out_BSD
        finally:
            self.real_T = None
            self.block.train(training)


_Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def runs_of_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> Iterator[BlockRun]:
    """Every block in turn with the inputs that it gets from those before it, as they are by then.

    Args:
        model: sparse or dense.
        blocks: all of its transformer blocks, in order.
        batches: model inputs.
    """
    device = next(model.parameters()).device
    calls: list[list[_Call]] = [[] for _ in blocks]
    hidden: list[Tensor] = []
    real: list[Tensor | None] = []
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        stack.enter_context(without_cache(model))
        model.eval()
        for block, kept in zip(blocks, calls, strict=True):

            def keep(module: nn.Module, args: Any, kwargs: Any, kept: list[_Call] = kept) -> None:
                if module is blocks[0]:
                    hidden.append(args[0] if args else kwargs["hidden_states"])
                kept.append(_with_hidden((args, kwargs), None))  # those of all blocks would take much memory

            stack.enter_context(block.register_forward_pre_hook(keep, with_kwargs=True))
        for batch in batches:
            inputs, token_mask = device_inputs(batch, device)
            inputs.pop("labels", None)
            body_of(model)(**inputs)
            real.append(token_mask)
    for block, kept in zip(blocks, calls, strict=True):
        run = BlockRun(block, [_with_hidden(call, states) for call, states in zip(kept, hidden, strict=True)], real)
        yield run
        if block is not blocks[-1]:
            hidden = list(run.outputs())


def _with_hidden(call: _Call, states: Tensor | None) -> _Call:
    args, kwargs = call
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


class _SeenEnough(Exception):
    """Leaves a forward whose later layers nobody watches."""


class _Gradients:
    """Of the loss, with respect to every FFN's output; only sums of their squares are kept."""

    def __init__(self, n_layers: int, of_neurons: NeuronGradients | None) -> None:
        self.backward = False
        self.measure_neurons = of_neurons
        self.outputs: dict[int, tuple[Tensor, Tensor, SparseFFN]] = {}
        self.squares: list[list[float]] = [[] for _ in range(n_layers)]
        self.of_tokens: list[list[Tensor]] = [[] for _ in range(n_layers)]
        self.of_neurons: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def watch(self, ffn: SparseFFN, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook."""
        output.requires_grad_(True)
        if not self.backward:
            self.outputs[ffn.layer_index] = args[0], output, ffn

    def take(self, loss: Tensor, labels: Tensor, token_mask: Tensor | None) -> None:
        """Backward through what the last forward left."""

        def measure(ffn: SparseFFN, x: Tensor, gradient: Tensor) -> None:
            layer = ffn.layer_index
            squares = gradient.float().square().sum(-1).flatten()
            mean = float(squares.mean())
            if math.isfinite(mean):
                self.squares[layer].append(mean)
                if self.measure_neurons is not None:
                    self.of_neurons[layer].append(self._of_neurons(ffn, x.flatten(0, -2), gradient.flatten(0, -2)))
            if labels.dim() == 1:  # one per row, and the loss is a mean over them
                norms = len(labels) * squares.sqrt()
                self.of_tokens[layer].append(norms if token_mask is None else norms[token_mask])

        for x, output, ffn in self.outputs.values():
            output.register_hook(partial(measure, ffn, x))
        self.outputs.clear()
        self.backward = True
        try:
            loss.backward()
        finally:
            self.backward = False

    @torch.no_grad()
    def _of_neurons(self, ffn: SparseFFN, x_TD: Tensor, gradients_TD: Tensor) -> Tensor:
        """[F] float32, the mean over the tokens; some are taken at a time."""
        assert self.measure_neurons is not None
        weights, parts = ffn.weights(), zip(x_TD.split(LOSS_ROWS), gradients_TD.split(LOSS_ROWS), strict=True)
        sums = [self.measure_neurons(weights, partial(ffn.hidden, x_tD), g_tD) for x_tD, g_tD in parts]
        return torch.stack(sums).sum(0).float() / len(x_TD)

    def all_zero(self) -> bool:
        """Whether the loss depends on no FFN."""
        return not any(any(squares) for squares in self.squares)

    def of(self, layer: int) -> tuple[float, Tensor | None, Tensor | None]:
        """Root mean square over tokens; the norm of every token where labels belong to rows; what neurons have."""
        squares, of_tokens, of_neurons = self.squares[layer], self.of_tokens[layer], self.of_neurons[layer]
        if not squares:
            return 0.0, torch.cat(of_tokens) if of_tokens else None, None
        mean = sum(squares) / len(squares)
        neurons_F = torch.stack(of_neurons).mean(0) if of_neurons else None
        return mean**0.5, torch.cat(of_tokens) if of_tokens else None, neurons_F


@contextmanager
def _as_dense(model: nn.Module) -> Iterator[ExitStack]:
    """The dense function in evaluation mode; gradients are asked of the FFNs' outputs, not of parameters."""
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        stack.callback(set_mode, model, Mode.HARD)
        stack.enter_context(_frozen(model))
        stack.enter_context(without_cache(model))
        model.eval()
        set_mode(model, Mode.DENSE)
        yield stack


def body_of(model: nn.Module) -> Any:
    """The model without its head: what it predicts takes memory, and FFNs run without it."""
    return getattr(model, "base_model", model)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keys and values are kept for tokens to come, and here none come."""
    config: Any = model.config
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Layers keep their inputs alone for the backward pass; with everything else a batch would take gigabytes."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    kept = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    before = [{name: getattr(layer, name) for name in kept if hasattr(layer, name)} for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.training = True  # it asks; its dropouts, children, stay as they are
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            if "_gradient_checkpointing_func" not in values:
                del layer._gradient_checkpointing_func
            for name, value in values.items():
                setattr(layer, name, value)


@contextmanager
def _loss_in_parts(model: Any) -> Iterator[None]:
    """A language model's loss is computed, forward and backward, for a few rows of logits at a time.

    In float32, with what the backward pass keeps, it takes six times as much as the logits of a bf16 model.
    """
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        yield
        return
    before = model.__dict__.get("_loss_function")
    model.loss_function = _causal_loss_in_parts
    try:
        yield
    finally:
        del model._loss_function
        if before is not None:
            model.loss_function = before


def _causal_loss_in_parts(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """Mean cross entropy of the next token, as ``ForCausalLMLoss`` without options; logits [B, S, V], labels [B, S]."""
    shifted_T = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)

    def part(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_TV.float(), labels_T, reduction="sum")

    parts = zip(logits.reshape(-1, vocab_size).split(LOSS_ROWS), shifted_T.split(LOSS_ROWS), strict=True)
    total = sum(checkpoint(part, *each, use_reentrant=False) for each in parts)
    return total / (shifted_T != -100).sum()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def token_count(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Tokens of some batches, padding left out."""
    return sum(_real_tokens(batch) for batch in batches)
