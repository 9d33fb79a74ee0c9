"""``sparsify(model, config)``: the one door from a dense model to a sparse one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lte.config import MethodConfig, SparsityConfig
from lte.errors import ConfigError
from lte.families import install_ffns
from lte.grouping import check_divisible, get_grouping, needs_activations
from lte.nn import Mode, SparseFFN, ThresholdRouter, set_mode, sparse_ffns

logger = logging.getLogger(__name__)
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def sparsify(
    model: AnyModel,
    config: MethodConfig,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
) -> AnyModel:
    """Turn a dense transformers model into a contextually sparse one, in place.

    Neurons are grouped and permuted (which leaves the dense function as it was), and every FFN gets a router.
    The routers are new: train them (:class:`lte.LTETrainer`) before you judge the model. Modes are left at
    ``hard``, which is what runs at inference and after :func:`lte.load`.

    Args:
        model: a model of a known family, see :data:`lte.families.FAMILIES`.
        config: the method and its settings, for instance :class:`lte.LTEConfig`.
        calibration: batches of model inputs, for groupings that look at activations.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: unknown family or activation.
        ConfigError: the expert size does not divide d_ff, the model is sparse already, or a grouping lacks
            its calibration data.
    """
    if sparse_ffns(model):
        raise ConfigError("the model is sparse already; load the dense checkpoint to start again")
    group = get_grouping(config.grouping)
    if calibration is None and needs_activations(config.grouping):
        raise ConfigError(
            f"grouping={config.grouping!r} needs calibration data: lte.sparsify(model, config, calibration=batches), "
            "with batches of model inputs"
        )
    install_sparse_ffns(model, config)
    ffns = sparse_ffns(model)
    activations = _collect_activations(model, ffns, calibration) if calibration is not None else None
    generator = torch.Generator().manual_seed(config.seed)
    for ffn in ffns:
        grouping = group(
            ffn.weights(),
            config.expert_size,
            seed=config.seed + ffn.layer_index,
            activations=None if activations is None else activations[ffn.layer_index],
        )
        ffn.weights().permute_(grouping.permutation)
        config.init_router(ffn.router, generator)
        logger.info("layer %d: grouped %d neurons by %s", ffn.layer_index, ffn.weights().d_ff, config.grouping)
    model.config.quantization_config = SparsityConfig(config, version("learn-to-be-efficient"))  # type: ignore[union-attr]
    return model


def install_sparse_ffns(model: nn.Module, config: MethodConfig) -> None:
    """Replace the FFNs, with routers that hold no values yet. Also what loading does, on the meta device."""

    def make_router(d_model: int, d_ff: int, like: nn.Parameter) -> ThresholdRouter:
        check_divisible(d_ff, config.expert_size)
        return config.make_router(d_model, d_ff // config.expert_size, like)

    install_ffns(model, make_router)


@torch.no_grad()
def _collect_activations(
    model: nn.Module, ffns: list[SparseFFN], calibration: Iterable[Mapping[str, Tensor]]
) -> list[Tensor]:
    """Run the dense model and keep, per layer, what enters the down projection: [T, F], padding left out."""
    kept: list[list[Tensor]] = [[] for _ in ffns]
    token_mask: Tensor | None = None

    def watch(ffn: SparseFFN, args: tuple[Any, ...]) -> None:
        hidden = ffn.hidden(args[0]).flatten(0, -2)
        kept[ffn.layer_index].append((hidden if token_mask is None else hidden[token_mask]).float().cpu())

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    set_mode(model, Mode.DENSE)
    with ExitStack() as stack:
        for ffn in ffns:
            stack.enter_context(ffn.register_forward_pre_hook(watch))
        for batch in calibration:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            mask = inputs.get("attention_mask")
            token_mask = None if mask is None else mask.flatten().bool()
            model(**inputs)
    set_mode(model, Mode.HARD)
    model.train(was_training)
    if not kept[0]:
        raise ConfigError("calibration holds no batches")
    return [torch.cat(chunks) for chunks in kept]
