"""Checks, workspaces and launches. Nothing here waits for the GPU or depends on which experts are active."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from lte.ops.lowbit import FFNCopy
from lte.ops.reference import expert_scores
from lte.ops.triton import kernels
from lte.ops.triton.checks import check_experts, check_ffn, check_tensor
from lte.ops.triton.configs import GPU, Config, Problem, config_for, token_bucket
from lte.ops.weights import FFNWeights

LIST_TOKENS, LIST_EXPERTS = 8, 1024


@dataclass(frozen=True)
class Launch:
    """One kernel launch: runtime arguments in order, compile-time ones by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Tensor | int | float | None, ...]
    constants: dict[str, Any]
    warps: int
    dependent: bool = False

    def __call__(self) -> None:
        """Launch on the current stream."""
        options = {"launch_pdl": True} if self.dependent else {}
        self.kernel[self.grid](*self.args, **self.constants, num_warps=self.warps, **options)


def sparse_ffn(x_TD: Tensor, weights: FFNWeights, expert_weights_TE: Tensor | None = None) -> Tensor:
    """``sparse_ffn_reference`` in two launches, whatever the number of active experts. Inference only.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16; accumulation is in float32.
        weights: the FFN, in the dtype of ``x_TD``; rows contiguous.
        expert_weights_TE: [T, E]: a boolean mask, or scales, of which a zero means that the expert does not run.
            None runs all neurons.

    Returns:
        [T, D]. Deterministic: the same bits for the same input on the same GPU.

    Raises:
        LTEError: an input these kernels cannot take.
    """
    check_ffn(x_TD, weights)
    if expert_weights_TE is not None:
        check_experts(weights.d_ff, expert_weights_TE.shape[-1])
        expert_weights_TE = kernel_mask(x_TD, expert_weights_TE)
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD)
    gpu = current_gpu(x_TD.device)
    config = config_for(gpu, problem_of(x_TD, weights, expert_weights_TE))
    out_TD, launches = ffn_launches(x_TD, weights, expert_weights_TE, config, gpu.sms, after_router=False)
    run(x_TD.device, launches)
    return out_TD


def routed_ffn(
    x_TD: Tensor, router_weight_ED: Tensor, router_bias_E: Tensor | None, threshold: float, weights: FFNWeights
) -> Tensor:
    """Threshold router and hard-mode sparse FFN: expert e runs where ``sigmoid(x W.T + b)[e] > threshold``.

    Three launches for up to 64 tokens. Scores are computed in float32. Arguments as for ``sparse_ffn``, and:

    Args:
        router_weight_ED: [E, D], of any floating dtype.
        router_bias_E: [E] or None.
        threshold: tau.

    Returns:
        [T, D].
    """
    check_ffn(x_TD, weights)
    n_tokens, n_experts = x_TD.shape[0], router_weight_ED.shape[0]
    check_experts(weights.d_ff, n_experts)
    check_tensor("router_weight_ED", router_weight_ED, (n_experts, weights.d_model), x_TD.device)
    if router_bias_E is not None:
        check_tensor("router_bias_E", router_bias_E, (n_experts,), x_TD.device)
    if n_tokens > token_bucket(n_tokens):
        # No longer bound by memory: a matrix product, which cuBLAS does better.
        bias = None if router_bias_E is None else router_bias_E.float()
        scores = torch.sigmoid(F.linear(x_TD.float(), router_weight_ED.float(), bias))
        return sparse_ffn(x_TD, weights, scores > threshold)
    if n_tokens == 0:
        return torch.empty_like(x_TD)
    gpu = current_gpu(x_TD.device)
    mask_TE = workspace((n_tokens, n_experts), torch.uint8, x_TD.device)
    config = config_for(gpu, problem_of(x_TD, weights, mask_TE))
    router = router_launch(x_TD, router_weight_ED, router_bias_E, threshold, mask_TE, pdl=config.pdl)
    out_TD, launches = ffn_launches(x_TD, weights, mask_TE, config, gpu.sms, after_router=True)
    run(x_TD.device, [router, *launches])
    return out_TD


def copy_scores(x_TD: Tensor, copy: FFNCopy, n_experts: int, weights: FFNWeights) -> Tensor:
    """``copy_scores_reference`` in one launch, and a sum where experts are larger than a neuron. Inference only.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16.
        copy: of the FFN.
        n_experts: number of experts E.
        weights: for the biases, in the dtype of ``x_TD``, and the activation.

    Returns:
        [T, E] float32.
    """
    check_experts(weights.d_ff, n_experts)
    if x_TD.shape[0] == 0:
        return torch.empty(0, n_experts, device=x_TD.device)
    scores_TF = workspace((x_TD.shape[0], weights.d_ff), torch.float32, x_TD.device)
    run(x_TD.device, [copy_scores_launch(x_TD, copy, weights, scores_TF)])
    return expert_scores(scores_TF, n_experts)


def copy_scores_launch(x_TD: Tensor, copy: FFNCopy, weights: FFNWeights, scores_TF: Tensor) -> Launch:
    """The launch that fills ``scores_TF``, [T, F] float32."""
    up, gate = copy.up, copy.gate
    n_tokens, blocks = x_TD.shape[0], 2
    constants = {
        "D": x_TD.shape[1],
        "F": weights.d_ff,
        "GROUPS": up.planes.shape[1],
        "GROUP": up.group,
        "BITS": up.bits,
        "ACT": weights.activation,
        "BLOCK_T": 16,
        "BLOCKS": blocks,
    }
    args = (
        *(x_TD.contiguous(), up.planes, up.scales),
        *((None, None) if gate is None else (gate.planes, gate.scales)),
        *(copy.norms, weights.up_bias, None if gate is None else weights.gate_bias, scores_TF, n_tokens),
    )
    grid = (triton.cdiv(weights.d_ff, 16 * blocks), triton.cdiv(n_tokens, 16))
    return Launch(kernels.copy_scores_kernel, grid, args, constants, warps=4)


def kernel_mask(x_TD: Tensor, expert_weights_TE: Tensor) -> Tensor:
    """``expert_weights_TE`` as the kernels read it: contiguous, and uint8 where it was bool."""
    expert_weights_TE = expert_weights_TE.contiguous()
    check_tensor("expert_weights_TE", expert_weights_TE, (len(x_TD), expert_weights_TE.shape[-1]), x_TD.device)
    return expert_weights_TE.view(torch.uint8) if expert_weights_TE.dtype == torch.bool else expert_weights_TE


def problem_of(x_TD: Tensor, weights: FFNWeights, expert_weights_TE: Tensor | None) -> Problem:
    """What the tiles are chosen by."""
    expert_size = weights.d_ff if expert_weights_TE is None else weights.d_ff // expert_weights_TE.shape[-1]
    return Problem(
        weights.d_model, weights.d_ff, expert_size, x_TD.dtype, weights.gate is not None, n_tokens=x_TD.shape[0]
    )


def router_launch(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, threshold: float, mask_TE: Tensor, *, pdl: bool
) -> Launch:
    """The launch that fills ``mask_TE``, [T, E] uint8."""
    (n_tokens, n_experts), d_model = mask_TE.shape, x_TD.shape[1]
    one = n_tokens == 1
    # For one token a row of the router is in flight as a whole; a tile of tokens needs the registers for its sums.
    block_t, block_e, block_d = (1, 1, 4096) if one else (16, 2, 256)
    constants = {
        "D": d_model,
        "E": n_experts,
        "PDL": pdl,
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        "BLOCK_D": min(block_d, triton.next_power_of_2(d_model)),
        "STAGES": 1 if one else 3,
    }
    grid = (triton.cdiv(n_experts, block_e), triton.cdiv(n_tokens, block_t))
    args = (x_TD.contiguous(), weight_ED, bias_E, mask_TE, weight_ED.stride(0), threshold, n_tokens)
    return Launch(kernels.router_kernel, grid, args, constants, warps=4 if one else 8)


def ffn_launches(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_weights_TE: Tensor | None,
    config: Config,
    sms: int,
    *,
    after_router: bool,
) -> tuple[Tensor, list[Launch]]:
    """The output and the two launches that fill it; ``expert_weights_TE`` is uint8 or floating, and contiguous."""
    n_tokens, d_model = x_TD.shape
    tile = _Tiles(n_tokens, weights, 1 if expert_weights_TE is None else expert_weights_TE.shape[1], config, sms)
    device = x_TD.device
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=device)
    hidden_TF = workspace((n_tokens, weights.d_ff), torch.float32 if tile.one else x_TD.dtype, device)
    done = workspace((tile.blocks, tile.n_done), torch.int32, device)
    partial = workspace((tile.splits, n_tokens, d_model), torch.float32, device) if tile.splits > 1 else None
    active = count = None
    if expert_weights_TE is not None:
        active = workspace((tile.blocks, tile.n_experts), torch.int32, device)
        count = workspace((tile.blocks,), torch.int32, device)
    lists = (active, count, done)
    hidden = _hidden_launch(x_TD.contiguous(), weights, expert_weights_TE, hidden_TF, lists, tile, after_router)
    return out_TD, [hidden, _down_launch(hidden_TF, weights, lists, partial, out_TD, tile)]


class _Tiles:
    """Sizes that follow from the shapes and the configuration, shared by both launches."""

    def __init__(self, n_tokens: int, weights: FFNWeights, n_experts: int, config: Config, sms: int) -> None:
        self.config = config
        self.n_tokens, self.n_experts = n_tokens, n_experts
        self.expert_size = weights.d_ff // n_experts
        self.one = n_tokens == 1
        self.block_t = token_bucket(n_tokens)
        self.blocks = triton.cdiv(n_tokens, self.block_t)
        smallest = 1 if self.one else 16
        # At least two steps for one token: the loads of a loop that ends after its first are not made asynchronous.
        widest = triton.cdiv(weights.d_model, 2) if self.one else weights.d_model
        self.hidden_cols = max(smallest, min(config.hidden_cols, triton.next_power_of_2(widest)))
        self.down_cols = max(smallest, min(config.down_cols, triton.next_power_of_2(weights.d_model)))
        self.n_done = triton.cdiv(weights.d_model, self.down_cols)
        wanted = config.down_programs_per_sm * sms // self.n_done
        # Several blocks of tokens fill the GPU by themselves, and their partial sums would be large.
        self.splits = 1 if self.blocks > 1 else max(1, min(wanted, triton.cdiv(weights.d_ff, config.down_rows), 64))

    def shape(self, weights: FFNWeights) -> dict[str, int]:
        """Compile-time sizes that all kernels take."""
        return {"D": weights.d_model, "F": weights.d_ff, "EXPERT": self.expert_size, "PDL": self.config.pdl}


def _hidden_launch(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_weights_TE: Tensor | None,
    hidden_TF: Tensor,
    lists: tuple[Tensor | None, Tensor | None, Tensor],
    tile: _Tiles,
    after_router: bool,
) -> Launch:
    config, gate = tile.config, weights.gate
    constants = tile.shape(weights) | {
        "E": tile.n_experts,
        "ACT": weights.activation,
        "LIST_T": 1 if tile.one else LIST_TOKENS,
        "LIST_E": min(LIST_EXPERTS, triton.next_power_of_2(tile.n_experts)),
        "N_DONE": tile.n_done,
        "DONE_PAD": triton.next_power_of_2(tile.n_done),
        "ROWS": config.hidden_rows,
        "BLOCK_D": tile.hidden_cols,
        "STAGES": config.hidden_stages,
    }
    args: tuple[Any, ...] = (
        *(x_TD, weights.up, gate, weights.up_bias, weights.gate_bias if gate is not None else None),
        *(expert_weights_TE, hidden_TF, *lists),
        *(weights.up.stride(0), 0 if gate is None else gate.stride(0)),
    )
    grid: tuple[int, ...] = (1 + triton.cdiv(weights.d_ff, config.hidden_rows),)
    kernel = kernels.hidden_one_kernel
    if not tile.one:
        kernel, grid, args = kernels.hidden_tile_kernel, (*grid, tile.blocks), (*args, tile.n_tokens)
        constants["BLOCK_T"] = tile.block_t
    return Launch(kernel, grid, args, constants, config.hidden_warps, dependent=config.pdl and after_router)


def _down_launch(
    hidden_TF: Tensor,
    weights: FFNWeights,
    lists: tuple[Tensor | None, Tensor | None, Tensor],
    partial: Tensor | None,
    out_TD: Tensor,
    tile: _Tiles,
) -> Launch:
    config = tile.config
    constants = tile.shape(weights) | {
        "ROWS": config.down_rows,
        "BLOCK_D": tile.down_cols,
        "SPLITS": tile.splits,
        "STAGES": config.down_stages,
    }
    args: tuple[Any, ...] = (
        hidden_TF,
        weights.down,
        weights.down_bias,
        *lists,
        partial,
        out_TD,
        weights.down.stride(0),
    )
    grid: tuple[int, ...] = (tile.n_done, tile.splits)
    if tile.one:
        constants["SUM_ROWS"] = min(16, triton.next_power_of_2(tile.splits))
        return Launch(kernels.down_one_kernel, grid, args, constants, config.down_warps, dependent=config.pdl)
    constants |= {"E": tile.n_experts, "BLOCK_T": tile.block_t, "N_DONE": tile.n_done}
    args = (*args, tile.n_tokens)
    grid = (*grid, tile.blocks)
    return Launch(kernels.down_tile_kernel, grid, args, constants, config.down_warps, dependent=config.pdl)


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scratch memory whose content means nothing until a kernel has written it."""
    return torch.empty(shape, dtype=dtype, device=device)


def current_gpu(device: torch.device) -> GPU:
    """The GPU of a device; a small stand-in where the kernels are interpreted on the CPU."""
    if device.type != "cuda":
        return GPU("interpreter", (8, 0), 4)
    return _gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _gpu(index: int) -> GPU:
    properties = torch.cuda.get_device_properties(index)
    return GPU(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def run(device: torch.device, launches: list[Launch]) -> None:
    """Launch on the current stream of the tensors' device, which need not be the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch()
