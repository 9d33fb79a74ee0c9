"""``quantize(model)``: the weights of a model, sparse or dense, in a few bits each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lte.activations import runs_of_blocks
from lte.config import WeightsConfig, method_config
from lte.errors import ConfigError
from lte.families import DECODERS, blocks_of
from lte.memory import trim_heap
from lte.nn import (
    FastLinear,
    NestedDown,
    NestedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    TiedHead,
    sparse_ffns,
    unsaid,
)
from lte.ops import lowbit
from lte.planes import (
    check_planes,
    check_reachable,
    is_by_neuron,
    round_to_planes,
    set_bits_per_token,
    weights_config,
)
from lte.rounding import round_compensated
from lte.sparsify import sparsify
from lte.thresholds import remember

AnyModel = TypeVar("AnyModel", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """A module whose weights are rounded.

    Attributes:
        name: in the model.
        parent, child: where it is put.
        module: the layer or embedding.
        role: in an FFN; empty elsewhere.
        nested: whether it is put into two planes, for neurons that are left out one by one.
        block: index of the block it is in; None for head and embeddings.
    """

    name: str
    parent: nn.Module
    child: str
    module: nn.Module
    role: str
    nested: bool
    block: int | None


def quantize(
    model: AnyModel,
    *,
    bits: int,
    group: int | None = None,
    head_bits: int | None = None,
    coarse: int | None = None,
    bits_per_token: float | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnyModel:
    """Round the weights of FFNs, attention, head and embeddings, in place; norms, biases and routers stay.

    With some text, errors are made up for by weights rounded later (:func:`lte.rounding.round_compensated`), block by
    block, each seeing what the rounded ones before it put out; without, every group's scale is the one, of some, with
    the smallest squared error. A model without sparse FFNs becomes one under the method ``dense``.

    FFNs of which the model's own copy picks single neurons (``self-prediction``) are put into two planes: the upper
    bits take the copy's place, and with ``bits_per_token`` neurons that matter less run on these alone
    (:func:`lte.planes.set_bits_per_token`). A dense model given ``bits_per_token`` is made one of these.

    Args:
        model: a causal language model of a family in :data:`lte.families.DECODERS`.
        bits: 1 to 8.
        group: weights that share a scale, a multiple of 32; of a down projection those of neighbouring neurons, of
            which an expert must have whole groups. None for 32, or 64, which single neurons need.
        head_bits: of head and embeddings; None for as many.
        coarse: upper bits of FFNs in two planes, 1 to 4; None for 4, and with ``bits_per_token`` for 3 of 4
            or 5.
        bits_per_token: bits of an FFN weight, scales included, that a token is to read in the mean; needs
            ``calibration``. None leaves thresholds as they are, and what runs runs on all bits.
        calibration: some batches of model inputs, a few thousand tokens in all.
        progress: called with layers done and in all.

    Returns:
        The same model; ``save_pretrained`` saves it as it is, :func:`lte.load` and ``AutoModel`` load it.

    Raises:
        ConfigError: the family is another, the weights are of few bits already, or experts are too small.
    """
    batches = list(calibration or ())
    if bits_per_token is not None and not batches:
        raise ConfigError(f"bits_per_token={bits_per_token} needs calibration data, on which thresholds are found")
    _check_family(model)
    ffns = sparse_ffns(model)
    nested = any(map(is_by_neuron, ffns)) or (not ffns and bits_per_token is not None)
    by_need = bits_per_token is not None
    settings = weights_config(bits, by_neuron=nested, by_need=by_need, group=group, coarse=coarse, head_bits=head_bits)
    if bits_per_token is not None:
        if ffns and not nested:
            raise ConfigError("bits_per_token needs neurons that the model's own copy picks: method self-prediction")
        config: Any = model.config
        check_reachable(bits_per_token, settings, config.hidden_size)
    if not ffns:
        sparsify(model, method_config("self-prediction" if nested else "dense", {}), calibration=batches)
    _check(model, settings)
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

    if batches:
        parts = [[place for place in every if place.block == index] for index in range(len(blocks_of(model)))]
        outside = [place for place in every if place.block is None]
        for part, inputs in zip([*parts, outside], block_inputs(model, batches, parts), strict=True):
            round_places(part, {last: inputs["head"]} if part is outside else inputs)
    else:
        round_places(every, {})
    _finish(model, settings)
    sparse: Any = model.config.quantization_config  # type: ignore[union-attr]
    if nested:  # they were of another copy's scores
        sparse.operating_points = []
    sparse.weights = settings
    if bits_per_token is not None:
        read_on_average(model, batches, bits_per_token)
    return model


def read_on_average(model: Any, batches: Sequence[Mapping[str, Tensor]], bits_per_token: float) -> None:
    """Set and remember thresholds by which a token reads so many bits of an FFN weight; two planes only."""
    point = set_bits_per_token(model, batches, bits_per_token)
    model.config.quantization_config.operating_points = []
    remember(model, point)


@torch.no_grad()
def block_inputs(
    model: Any, batches: Sequence[Mapping[str, Tensor]], layers: Sequence[Sequence[Place]]
) -> Iterator[dict[str, Tensor]]:
    """For one block after the other, ``sum x x^T`` over the inputs of its layers, by name; last those of the ``head``.

    A block's layers may be replaced between two of them: the next block sees what comes out of the new ones.
    """
    for run, its in zip(runs_of_blocks(model, blocks_of(model), batches), layers, strict=True):
        sums: dict[str, Tensor] = {}
        watching = [place.module.register_forward_pre_hook(_adder(sums, place.name)) for place in its]
        with unsaid():
            for _ in run.outputs():
                pass
        for handle in watching:
            handle.remove()
        yield sums
    norm = model.base_model.get_submodule(DECODERS[model.config.model_type].final_norm)
    of_head: dict[str, Tensor] = {}
    for x in run.outputs():
        _adder(of_head, "head")(norm, (norm(x),))
    yield of_head


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TD = args[0].detach().flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x_TD.T @ x_TD

    return add


def _round(place: Place, settings: WeightsConfig, squares_DD: Tensor | None) -> None:
    module: Any = place.module
    weight_ND = module.weight.detach()
    made = _empty(place, settings, weight_ND.device)
    if squares_DD is not None and len(squares_DD) != weight_ND.shape[1]:
        squares_DD = None
    if isinstance(made, NestedLinear | NestedDown):
        round_to_planes(made, weight_ND, squares_DD, settings)
    elif squares_DD is None:
        made.hold(lowbit.quantize(weight_ND, made.bits, made.group, by_columns=made.by_columns))
    else:
        made.hold(round_compensated(weight_ND, squares_DD, made.bits, made.group, by_columns=made.by_columns))
    if isinstance(made, QuantizedLinear | NestedDown):
        made.bias = module.bias
    _put(place, made)
    trim_heap(weight_ND.device)


def install_quantized(model: nn.Module, settings: WeightsConfig) -> None:
    """Put modules that hold nothing yet in the place of those that are rounded: what loading does."""
    _check_family(model)
    _check(model, settings)
    for place in list(places(model)):
        _put(place, _empty(place, settings, place.module.weight.device))  # type: ignore[arg-type]
    _finish(model, settings)


def places(model: nn.Module) -> Iterator[Place]:
    """What is rounded, in the order of the model."""
    of_ffn = {
        id(getattr(ffn, name)): (role, is_by_neuron(ffn))
        for ffn in sparse_ffns(model)
        for role, name in ffn.roles.items()
    }
    routers = {id(module) for ffn in sparse_ffns(model) for module in ffn.router.modules()}
    blocks = {id(module): index for index, block in enumerate(blocks_of(model)) for module in block.modules()}
    for name, module in list(model.named_modules()):
        for child, layer in module.named_children():
            wanted = type(layer) in (nn.Linear, FastLinear) or isinstance(layer, nn.Embedding)
            if wanted and id(layer) not in routers:
                full = f"{name}.{child}".lstrip(".")
                role, nested = of_ffn.get(id(layer), ("", False))
                yield Place(full, module, child, layer, role, nested, blocks.get(id(layer)))


def quantized_modules(model: nn.Module) -> list[QuantizedWeight]:
    """The modules that hold weights of few bits."""
    return [module for module in model.modules() if isinstance(module, QuantizedWeight)]


def _check_family(model: Any) -> None:
    """ConfigError where weights of this model cannot be of few bits, or are already."""
    family = getattr(model.config, "model_type", type(model).__name__)
    if family not in DECODERS or not hasattr(model, "lm_head"):
        raise ConfigError(
            f"a {type(model).__name__} of family {family!r} cannot be quantised: it is for causal language models of "
            f"{', '.join(DECODERS)}"
        )
    if quantized_modules(model):
        raise ConfigError("the weights are of few bits already; load the model they were rounded from")


def _check(model: Any, settings: WeightsConfig) -> None:
    for ffn in sparse_ffns(model):
        if is_by_neuron(ffn):
            check_planes(ffn, settings)
            continue
        size = ffn.weights().d_ff // ffn.n_experts
        if ffn.n_experts > 1 and size % settings.group:
            raise ConfigError(
                f"experts of {size} neurons cannot be of few bits in groups of {settings.group}: their down projection "
                "shares scales between as many neurons. Use a smaller group, experts of more neurons, or single ones "
                "that the model's own copy picks (self-prediction)"
            )


def _empty(
    place: Place, settings: WeightsConfig, device: torch.device
) -> QuantizedLinear | QuantizedEmbedding | NestedDown:
    bits = settings.bits if place.block is not None or settings.head_bits is None else settings.head_bits
    storage: dict[str, Any] = {"bits": bits, "group": settings.group, "device": device}
    module: Any = place.module
    if isinstance(module, nn.Embedding):
        size, scale = (module.num_embeddings, module.embedding_dim), getattr(module, "scalar_embed_scale", 1.0)
        return QuantizedEmbedding(*size, scale=scale, dtype=module.weight.dtype, **storage)
    wide, biased = (module.in_features, module.out_features), module.bias is not None
    if place.nested:
        storage |= {"bias": biased, "coarse": settings.coarse or bits}
        if place.role == "down":
            return NestedDown(*wide, exact=min(settings.exact, module.in_features), **storage)
        return NestedLinear(*wide, **storage)
    return QuantizedLinear(*wide, bias=biased, by_columns=place.role == "down", **storage)


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
