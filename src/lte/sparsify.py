"""``sparsify(model, config)``: the one door from a dense model to a sparse one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lte.activations import stream_activations
from lte.config import MethodConfig, SparsityConfig, method_of
from lte.errors import ConfigError
from lte.families import family_spec, install_ffns, replace_activation
from lte.grouping import Activations, check_divisible, get_grouping
from lte.memory import trim_heap
from lte.nn import Router, SparseFFN, sparse_ffns
from lte.thresholds import enable_dial

logger = logging.getLogger(__name__)
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def sparsify(
    model: AnyModel,
    config: MethodConfig,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    timings: dict[str, float] | None = None,
) -> AnyModel:
    """Turn a dense transformers model into a contextually sparse one, in place.

    Neurons are grouped and permuted (which leaves the dense function as it was), and every FFN gets a router.
    The routers are new: train them (:class:`lte.LTETrainer`) before you judge the model. Modes are left at
    ``hard``, which is what runs at inference and after :func:`lte.load`.

    Args:
        model: a model of a known family, see :data:`lte.families.FAMILIES`.
        config: the method and its settings, for instance :class:`lte.LTEConfig`.
        calibration: some batches of model inputs, a few thousand tokens in all, with their labels where there are
            any. The default grouping and the routers' initialisation look at what the dense model does on them.
        timings: filled with the seconds that ``calibration`` (the dense model on the batches, forward and backward),
            ``grouping`` and ``routers`` took.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: unknown family or activation.
        ConfigError: the expert size does not divide d_ff, the model is sparse already or loaded with tensor
            parallelism, or calibration data is needed and missing.
    """
    if sparse_ffns(model):
        raise ConfigError("the model is sparse already; load the dense checkpoint to start again")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ConfigError(
            f"the model lies in {model.tp_size} parts (tensor parallelism): masks of the whole FFN would meet parts of "
            "it; load it whole, or with device_map"
        )
    get_grouping(config.grouping)
    needed = method_of(config).needs_calibration
    batches = list(calibration or ()) if needed else []
    if not method_of(config).looks_at_loss:
        batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    if needed and not batches:
        raise ConfigError(
            f"{needed} needs calibration data: lte.sparsify(model, config, "
            "calibration=batches), with batches of model inputs, best with their labels; or choose "
            "grouping='kmeans', router_init='random'"
        )
    before = [(module, dict(module._modules)) for module in model.modules()]
    spec: Any = family_spec(model)
    activation = getattr(model.config, spec.config_act)
    try:
        spent = _convert(model, config, batches)
    except BaseException:
        # Neurons may be in another order by now, which changes nothing; the dense modules come back.
        for module, children in before:
            module._modules.clear()
            module._modules.update(children)
        setattr(model.config, spec.config_act, activation)
        raise
    if timings is not None:
        timings.update(spent)
    enable_dial(model)
    settled = method_of(config).settled(sparse_ffns(model))
    entry = SparsityConfig(settled, version("learn-to-be-efficient"))
    model.config.quantization_config = entry  # type: ignore[union-attr]
    return model


def _convert(model: nn.Module, config: MethodConfig, batches: list[Mapping[str, Tensor]]) -> dict[str, float]:
    started = time.perf_counter()
    spent = {"calibration": 0.0, "grouping": 0.0}
    install_sparse_ffns(model, config)
    ffns, method = sparse_ffns(model), method_of(config)
    generator = torch.Generator().manual_seed(config.seed)
    if not batches:
        for ffn in ffns:
            _group(ffn, config, None)
        spent["grouping"] = time.perf_counter() - started
        method.init_routers(ffns, None, generator)
    else:
        seen = stream_activations(model, batches, method.neuron_gradients, in_sequence=method.in_sequence)
        grouped = _group_each(ffns, config, seen, spent)
        method.init_routers(ffns, grouped, generator)
        for _ in grouped:  # what a method did not ask to see is grouped all the same
            pass
        method.fit_blocks(model, batches)
    spent["routers"] = time.perf_counter() - started - sum(spent.values())
    return spent


def _group_each(
    ffns: Sequence[SparseFFN], config: MethodConfig, activations: Iterator[Activations], spent: dict[str, float]
) -> Iterator[Activations]:
    """Pass calibrations on, each once the neurons of its FFN are in their order; add up what it takes in ``spent``."""
    for ffn in ffns:
        times = [time.perf_counter()]
        seen = next(activations)
        times.append(time.perf_counter())
        permutation = _group(ffn, config, seen)
        if seen.neuron_gradients_F is not None:
            seen = replace(seen, neuron_gradients_F=seen.neuron_gradients_F[permutation])
        spent["calibration"] += times[1] - times[0]
        spent["grouping"] += time.perf_counter() - times[1]
        yield seen
        del seen
        trim_heap(ffn.weights().up.device)


def _group(ffn: SparseFFN, config: MethodConfig, seen: Activations | None) -> Tensor:
    """Put the neurons of an FFN in order; which order."""
    weights = ffn.weights()
    grouping = get_grouping(config.grouping)(
        weights, config.expert_size, seed=config.seed + ffn.layer_index, activations=seen
    )
    weights.permute_(grouping.permutation)
    logger.info("layer %d: grouped %d neurons by %s", ffn.layer_index, weights.d_ff, config.grouping)
    return grouping.permutation


def install_sparse_ffns(model: nn.Module, config: MethodConfig) -> None:
    """Replace the FFNs, with routers that hold no values yet. Also what loading does, on the meta device."""
    method = method_of(config)
    if config.activation is not None:
        replace_activation(model, config.activation)

    def make_router(d_model: int, d_ff: int, like: nn.Parameter) -> Router:
        check_divisible(d_ff, config.expert_size)
        return method.make_router(d_model, d_ff // config.expert_size, like)

    install_ffns(model, make_router, config.layers)
    method.install(model)
