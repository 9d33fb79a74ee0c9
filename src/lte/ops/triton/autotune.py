"""Measure the candidate tiles on this machine and keep the fastest. Runs only when called."""

from __future__ import annotations

import statistics

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from lte.errors import LTEError
from lte.ops.triton.configs import Config, candidates, config_for, remember
from lte.ops.triton.launch import Launch, current_gpu, ffn_launches, problem_of
from lte.ops.weights import FFNWeights


def autotune(x_TD: Tensor, weights: FFNWeights, expert_weights_TE: Tensor | None, *, repeats: int = 30) -> Config:
    """Time each candidate as a CUDA graph from a cold L2 cache, and write the fastest to the cache file.

    Args:
        x_TD, weights, expert_weights_TE: a representative call of ``sparse_ffn``; the number of tokens chooses the
            bucket (1, 16, 32, 64) that is tuned, the number of active experts should be the usual one.
        repeats: measurements per candidate; their median counts.

    Returns:
        The configuration that later calls of this shape use. While a CUDA graph is being captured nothing is measured.
    """
    if x_TD.device.type != "cuda":
        raise LTEError(f"autotune measures on a GPU, and x_TD is on {x_TD.device}.")
    gpu, problem = current_gpu(x_TD.device), problem_of(x_TD, weights, expert_weights_TE)
    if torch.cuda.is_current_stream_capturing():
        return config_for(gpu, problem)
    if expert_weights_TE is not None and expert_weights_TE.dtype == torch.bool:
        expert_weights_TE = expert_weights_TE.contiguous().view(torch.uint8)
    times: dict[Config, float] = {}
    for config in candidates(gpu, problem):
        out_TD, launches = ffn_launches(x_TD, weights, expert_weights_TE, config, gpu.sms, after_router=False)
        try:
            times[config] = _milliseconds(launches, repeats)
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory or registers than this GPU has
        del out_TD
    fastest = min(times, key=times.__getitem__)
    remember(gpu, problem, fastest)
    return fastest


def _milliseconds(launches: list[Launch], repeats: int) -> float:
    for launch in launches:
        launch()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
