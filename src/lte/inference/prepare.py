"""``prepare_for_inference(model)``: pack, measure, and take over the decode step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lte.errors import BackendError, ConfigError
from lte.hub import require_sparse
from lte.inference.crossover import Crossover, machine_name, measure, shape_name
from lte.inference.decode import DecodeStep
from lte.inference.packing import pack_linears, pack_quantized, streaming_copy
from lte.nn import CopyRouter, FastLinear, QuantizedWeight, SparseFFN, sparse_ffns
from lte.nn.ffn import PathChooser, path_unmeasured
from lte.ops import backend_obstacle, requested_backend

logger = logging.getLogger(__name__)
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def prepare_for_inference(
    model: AnyModel,
    *,
    impl: str = "auto",
    crossover: Crossover | str | Path | None = None,
    expected_sparsity: float = 0.5,
    fuse_decode: bool = True,
    mask_prompts: bool = False,
) -> AnyModel:
    """Make a sparse model fast, in place: ``generate`` and ``forward`` then run the kernels by themselves.

    - FFN weights are laid out with one contiguous row per neuron (shapes, names and values stay; saving is unchanged).
    - The machine is measured once: from which number of tokens and which density on dense matrix products are faster.
      They run there, so that the sparse model is never slower than the dense one; one log line says what was found.
    - Where single neurons are picked by the FFN's own copy and kernels run, prompts of more than 64 tokens run all of
      them: some token needs every neuron, so a mask would take time and save none. (Weights of few bits keep the mask.)
    - On the CPU, linear layers go through a matrix-vector operator, and for the families in
      :data:`lte.families.DECODERS` one call computes the whole decode step.

    Training, adapters and hooks keep working: with gradients enabled, in train mode, or with hooks on the modules, the
    stock modules run.

    Args:
        model: from :func:`lte.load` or :func:`lte.sparsify`, in hard mode.
        impl: ``auto``; ``reference``, ``cpu`` or ``triton`` to run that and measure nothing.
        crossover: a table measured before, or the folder it was saved in; not used, and measured again, where it is
            from another machine or model.
        expected_sparsity: the sparsity assumed on a GPU, where the decision cannot look at the mask.
        fuse_decode: False leaves the decode step to the stock modules.
        mask_prompts: leave single neurons out of prompts of more than 64 tokens as well, as evaluation and
            ``impl="reference"`` do, slower than dense.

    Returns:
        The same model, in eval mode, its table as ``model.lte_crossover``.

    Raises:
        CheckpointError: the model is dense or not in hard mode.
        BackendError: ``impl`` cannot run here.
    """
    require_sparse(model)
    restore(model)
    model.eval()
    ffns = sparse_ffns(model)
    device = next(iter(model.parameters())).device.type
    hindered = {ffn.layer_index: reason for ffn in ffns if (reason := ffn.obstacle(device))}
    if hindered:
        logger.warning(
            "the FFNs of layers %s will not run through the kernels: %s",
            ", ".join(map(str, hindered)),
            "; ".join(dict.fromkeys(hindered.values())),
        )
    backend = _backend(model, impl)
    if backend == "reference":
        _set_path(ffns, Forced("reference"))
        return model
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        if backend == "cpu":
            pack_quantized(model)
            _speed_up_cpu(model, ffns, 0, fuse_decode, hindered)
        return model
    for ffn in ffns:
        ffn.pack(streaming_copy)
        ffn.keep_layout = False  # until the next training step; asking on every call costs decoding time
    if not 0 <= expected_sparsity <= 1:
        raise ConfigError(f"expected_sparsity={expected_sparsity} is out of range; it is a share, from 0 to 1")
    if requested_backend(impl) in ("auto", "fastest"):
        table = _table(ffns[0], backend, crossover, 1 - expected_sparsity)
        model.lte_crossover = table  # type: ignore[assignment]
        _set_path(ffns, table.choose)
        linear_tokens = table.linear_tokens
    else:
        _set_path(ffns, Forced(backend))
        linear_tokens = 64
    for ffn in ffns:
        picks_neurons = isinstance(ffn.router, CopyRouter) and ffn.n_experts == ffn.weights().d_ff
        ffn.masks_prompts = mask_prompts or not picks_neurons
    if backend == "cpu":
        _speed_up_cpu(model, ffns, linear_tokens, fuse_decode, hindered)
    return model


def restore(model: nn.Module) -> None:
    """Undo what :func:`prepare_for_inference` did, but for the layout of the weights."""
    for module in model.modules():
        if isinstance(module, FastLinear):
            module.release()
    if isinstance(model.__dict__.get("forward"), DecodeStep):
        del model.__dict__["forward"]
    for ffn in sparse_ffns(model):
        ffn.choose_path = path_unmeasured
        ffn.masks_prompts = True
    model.__dict__.pop("lte_crossover", None)


def _speed_up_cpu(
    model: Any, ffns: list[SparseFFN], linear_tokens: int, fuse_decode: bool, hindered: dict[int, str]
) -> None:
    inside = {id(module) for ffn in ffns for module in ffn.modules()}
    linears = pack_linears(model, inside)
    if fuse_decode:
        step = DecodeStep(model)
        reason = step.obstacle()
        if reason:
            logger.info("decode runs module by module: %s", reason)
        else:
            model.forward = step
            if hindered:  # hooks may go
                logger.info("decode runs module by module as long as that is so")
            else:
                logger.info("decode runs as one fused step per token")
    if linear_tokens:
        for module in linears:
            FastLinear.adopt(module, linear_tokens)


def _backend(model: Any, impl: str) -> str:
    dtype, device = model.dtype, next(iter(model.parameters())).device
    wanted = requested_backend(impl)
    if wanted in ("auto", "fastest"):
        fast = "triton" if device.type == "cuda" else "cpu"
        reason = backend_obstacle(fast, dtype, device)
        if reason:
            logger.warning("the sparse FFN runs the reference, no faster than dense: %s", reason)
            return "reference"
        return fast
    if wanted != "reference":
        reason = backend_obstacle(wanted, dtype, device)
        if reason:
            raise BackendError(f"backend {wanted!r} cannot run: {reason}; use another, or impl='auto'")
    return wanted


def _table(
    ffn: SparseFFN, backend: str, crossover: Crossover | str | Path | None, expected_density: float
) -> Crossover:
    if isinstance(crossover, str | Path):
        crossover = Crossover.read(crossover)
    if crossover is not None:
        here = (machine_name(ffn.weights().up.device), shape_name(ffn), backend)
        if (crossover.machine, crossover.shape, crossover.backend) == here:
            logger.info("measured before: %s", crossover.describe())
            return crossover
        logger.warning("the saved speeds are of %s, %s; measuring again", crossover.machine, crossover.shape)
    return measure(ffn, backend, expected_density=expected_density)


@dataclass(frozen=True)
class Forced:
    """One implementation, whatever the number of tokens; a :data:`lte.nn.ffn.PathChooser`."""

    impl: str

    def __call__(self, tokens: int) -> tuple[str, float]:
        """``impl`` and ``max_density``."""
        return self.impl, 1.0


def _set_path(ffns: list[SparseFFN], choose: PathChooser) -> None:
    for ffn in ffns:
        ffn.choose_path = choose
