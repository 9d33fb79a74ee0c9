"""``quantize(model)``: the weights of a model, sparse or dense, in a few bits each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lte.calibration import device_inputs, without_cache
from lte.config import WeightsConfig, method_config
from lte.errors import ConfigError
from lte.families import DECODERS, blocks_of
from lte.memory import trim_heap
from lte.nn import FastLinear, QuantizedEmbedding, QuantizedLinear, QuantizedWeight, TiedHead, sparse_ffns
from lte.ops import lowbit
from lte.rounding import round_compensated
from lte.sparsify import sparsify

AnyModel = TypeVar("AnyModel", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """A module whose weights are rounded.

    Attributes:
        name: in the model.
        parent, child: where it is put.
        module: the layer or embedding.
        by_columns: whether the weights of a group of inputs are to lie together: of the neurons of a down projection.
        block: index of the block it is in; None for head and embeddings.
    """

    name: str
    parent: nn.Module
    child: str
    module: nn.Module
    by_columns: bool
    block: int | None


def quantize(
    model: AnyModel,
    *,
    bits: int,
    group: int = 32,
    head_bits: int | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnyModel:
    """Round the weights of FFNs, attention, head and embeddings, in place; norms, biases and routers stay.

    With some text, errors are made up for by weights rounded later (:func:`lte.rounding.round_compensated`), block by
    block, each seeing what the rounded ones before it put out; without, every group's scale is the one, of some, with
    the smallest squared error. A model without sparse FFNs becomes one under the method ``dense``.

    Args:
        model: a causal language model of a family in :data:`lte.families.DECODERS`.
        bits: 1 to 8.
        group: weights that share a scale, a multiple of 32; of a down projection those of neighbouring neurons, of
            which an expert must have whole groups.
        head_bits: of head and embeddings; None for as many.
        calibration: some batches of model inputs, a few thousand tokens in all.
        progress: called with layers done and in all.

    Returns:
        The same model; ``save_pretrained`` saves it as it is, :func:`lte.load` and ``AutoModel`` load it.

    Raises:
        ConfigError: the family is another, the weights are of few bits already, or experts are too small.
    """
    settings = WeightsConfig(bits=bits, group=group, head_bits=head_bits)
    _check(model, settings)
    if not sparse_ffns(model):
        sparsify(model, method_config("dense", {}))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    settings = settings.model_copy(update={"tied": tied})
    # A tied head's inputs are what the embeddings' weights are multiplied with.
    every = [place for place in places(model) if not (tied and place.module is head)]
    last = next(place.name for place in every if place.module is (embedding if tied else head))
    done = 0

    def round_places(part: Iterable[Place], squares: Mapping[str, Tensor]) -> None:
        nonlocal done
        for place in part:
            _round(place, settings, squares.get(place.name))
            done += 1
            if progress is not None:
                progress(done, len(every))

    batches = list(calibration or ())
    if batches:
        parts = [[place for place in every if place.block == index] for index in range(len(blocks_of(model)))]
        outside = [place for place in every if place.block is None]
        for part, inputs in zip([*parts, outside], block_inputs(model, batches, parts), strict=True):
            round_places(part, {last: inputs["head"]} if part is outside else inputs)
    else:
        round_places(every, {})
    _finish(model, settings)
    model.config.quantization_config.weights = settings  # type: ignore[union-attr]
    return model


@torch.no_grad()
def block_inputs(
    model: Any, batches: Sequence[Mapping[str, Tensor]], layers: Sequence[Sequence[Place]]
) -> Iterator[dict[str, Tensor]]:
    """For one block after the other, ``sum x x^T`` over the inputs of its layers, by name; last those of the ``head``.

    A block's layers may be replaced between two of them: the next block sees what comes out of the new ones.
    """
    blocks, device = blocks_of(model), next(iter(model.parameters())).device
    options: list[list[dict[str, Any]]] = [[] for _ in blocks]
    hidden: list[Tensor] = []

    def keep(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            options[index].append(kwargs)
            if index == 0:
                hidden.append(args[0])

        return hook

    handles = [block.register_forward_pre_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for batch in batches:
            inputs, _ = device_inputs({name: value for name, value in batch.items() if name != "labels"}, device)
            with without_cache(model):
                model.base_model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for block, given, its in zip(blocks, options, layers, strict=True):
        sums: dict[str, Tensor] = {}
        watching = [place.module.register_forward_pre_hook(_adder(sums, place.name)) for place in its]
        for x, kwargs in zip(hidden, given, strict=True):
            block(x, **kwargs)
        for handle in watching:
            handle.remove()
        yield sums
        hidden = [_first(block(x, **kwargs)) for x, kwargs in zip(hidden, given, strict=True)]
    norm = model.base_model.get_submodule(DECODERS[model.config.model_type].final_norm)
    of_head: dict[str, Tensor] = {}
    for x in hidden:
        _adder(of_head, "head")(norm, (norm(x),))
    yield of_head


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TD = args[0].detach().flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x_TD.T @ x_TD

    return add


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _round(place: Place, settings: WeightsConfig, squares_DD: Tensor | None) -> None:
    module: Any = place.module
    weight_ND = module.weight.detach()
    made = _empty(place, settings, weight_ND.device)
    if squares_DD is None or len(squares_DD) != weight_ND.shape[1]:
        made.hold(lowbit.quantize(weight_ND, made.bits, made.group, by_columns=made.by_columns))
    else:
        made.hold(round_compensated(weight_ND, squares_DD, made.bits, made.group, by_columns=made.by_columns))
    if isinstance(made, QuantizedLinear):
        made.bias = module.bias
    _put(place, made)
    trim_heap(weight_ND.device)


def install_quantized(model: nn.Module, settings: WeightsConfig) -> None:
    """Put modules that hold nothing yet in the place of those that are rounded: what loading does."""
    _check(model, settings)
    for place in list(places(model)):
        _put(place, _empty(place, settings, place.module.weight.device))  # type: ignore[arg-type]
    _finish(model, settings)


def places(model: nn.Module) -> Iterator[Place]:
    """What is rounded, in the order of the model."""
    downs = {id(ffn._modules[ffn.roles["down"]]) for ffn in sparse_ffns(model) if "down" in ffn.roles}
    routers = {id(module) for ffn in sparse_ffns(model) for module in ffn.router.modules()}
    blocks = {id(module): index for index, block in enumerate(blocks_of(model)) for module in block.modules()}
    for name, module in list(model.named_modules()):
        for child, layer in module.named_children():
            wanted = type(layer) in (nn.Linear, FastLinear) or isinstance(layer, nn.Embedding)
            if wanted and id(layer) not in routers:
                full = f"{name}.{child}".lstrip(".")
                yield Place(full, module, child, layer, id(layer) in downs, blocks.get(id(layer)))


def quantized_modules(model: nn.Module) -> list[QuantizedWeight]:
    """The modules that hold weights of few bits."""
    return [module for module in model.modules() if isinstance(module, QuantizedWeight)]


def _check(model: Any, settings: WeightsConfig) -> None:
    family = getattr(model.config, "model_type", type(model).__name__)
    if family not in DECODERS or not hasattr(model, "lm_head"):
        raise ConfigError(
            f"a {type(model).__name__} of family {family!r} cannot be quantised: it is for causal language models of "
            f"{', '.join(DECODERS)}"
        )
    if quantized_modules(model):
        raise ConfigError("the weights are of few bits already; load the model they were rounded from")
    for ffn in sparse_ffns(model):
        size = ffn.weights().d_ff // ffn.n_experts
        if ffn.n_experts > 1 and size % settings.group:
            raise ConfigError(
                f"experts of {size} neurons cannot be of few bits in groups of {settings.group}: their down projection "
                "shares scales between as many neurons. Use a smaller group, or experts of more neurons"
            )


def _empty(place: Place, settings: WeightsConfig, device: torch.device) -> QuantizedLinear | QuantizedEmbedding:
    bits = settings.bits if place.block is not None or settings.head_bits is None else settings.head_bits
    storage: dict[str, Any] = {"bits": bits, "group": settings.group, "device": device}
    module: Any = place.module
    if isinstance(module, nn.Embedding):
        size, scale = (module.num_embeddings, module.embedding_dim), getattr(module, "scalar_embed_scale", 1.0)
        return QuantizedEmbedding(*size, scale=scale, dtype=module.weight.dtype, **storage)
    wide = module.in_features, module.out_features
    return QuantizedLinear(*wide, bias=module.bias is not None, by_columns=place.by_columns, **storage)


def _put(place: Place, made: nn.Module) -> None:
    made.train(place.module.training)
    setattr(place.parent, place.child, made)


def _finish(model: Any, settings: WeightsConfig) -> None:
    if settings.tied:
        model.set_output_embeddings(TiedHead(model.get_input_embeddings()))
    model.config.tie_word_embeddings = False  # as transformers does it; the head knows
    model.all_tied_weights_keys = {}
    for ffn in sparse_ffns(model):
        ffn._packed = None
