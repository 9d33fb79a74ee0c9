"""``quantize(model)``: the weights of a model, sparse or dense, in a few bits each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lte.config import WeightsConfig, method_config
from lte.errors import ConfigError
from lte.families import DECODERS
from lte.memory import trim_heap
from lte.nn import FastLinear, QuantizedEmbedding, QuantizedLinear, QuantizedWeight, SparseFFN, TiedHead, sparse_ffns
from lte.ops import lowbit
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
    """

    name: str
    parent: nn.Module
    child: str
    module: nn.Module
    by_columns: bool


def quantize(
    model: AnyModel,
    *,
    bits: int,
    group: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> AnyModel:
    """Round the weights of FFNs, attention, head and embeddings, in place; norms, biases and routers stay.

    Every group's scale is the one, of some, with the smallest squared error. A model without sparse FFNs becomes one
    under the method ``dense``, which leaves nothing out.

    Args:
        model: a causal language model of a family in :data:`lte.families.DECODERS`.
        bits: 1 to 8.
        group: weights that share a scale, a multiple of 32; of a down projection those of neighbouring neurons, of
            which an expert must have whole groups.
        progress: called with layers done and in all.

    Returns:
        The same model; ``save_pretrained`` saves it as it is, :func:`lte.load` and ``AutoModel`` load it.

    Raises:
        ConfigError: the family is another, the weights are of few bits already, or experts are too small.
    """
    settings = WeightsConfig(bits=bits, group=group)
    _check(model, settings)
    if not sparse_ffns(model):
        sparsify(model, method_config("dense", {}))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    settings = settings.model_copy(update={"tied": tied})
    every = list(places(model))
    for done, place in enumerate(every):
        if progress is not None:
            progress(done, len(every))
        made = _empty(place, settings, place.module.weight.device)
        weight: Any = place.module.weight
        made.hold(lowbit.quantize(weight.detach(), bits, group, by_columns=place.by_columns))
        if isinstance(made, QuantizedLinear):
            made.bias = place.module.bias  # type: ignore[assignment]
        _put(place, made)
        del weight
        trim_heap(made.codes.device)
    _finish(model, settings)
    model.config.quantization_config.weights = settings  # type: ignore[union-attr]
    return model


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
    for name, module in list(model.named_modules()):
        for child, layer in module.named_children():
            wanted = type(layer) in (nn.Linear, FastLinear) or isinstance(layer, nn.Embedding)
            if wanted and id(layer) not in routers:
                yield Place(f"{name}.{child}".lstrip("."), module, child, layer, id(layer) in downs)


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
    storage: dict[str, Any] = {"bits": settings.bits, "group": settings.group, "device": device}
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
