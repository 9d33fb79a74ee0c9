"""What a sparse checkpoint is made of, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from lte.accounting import GFLOP, model_cost, parameter_counts
from lte.errors import CheckpointError
from lte.hub import is_sparse_config, load, read_config
from lte.nn import sparse_ffns
from lte.run_folder import read_run


def inspect_checkpoint(path: str) -> dict[str, Any]:
    """Experts, sparsity where training recorded it, FLOPs and parameters of a sparse checkpoint.

    Returns:
        ``model``, ``config`` (the sparsity settings), ``parameters``, ``sparsity``, ``gflops_per_token`` and
        ``bytes_per_token`` (None and dense only where the sparsity is not known), and ``layers``: one entry per sparse
        FFN with ``block``, ``experts``, ``expert_size``, ``threshold`` (None where none decides), ``sparsity``, and
        ``mflops`` per token (2^20) ``dense`` / ``sparse`` / ``router`` of the FFN.
    """
    if not is_sparse_config(read_config(path)):
        raise CheckpointError(f"{path} is a dense checkpoint: it has no experts to inspect")
    model = load(path, dtype=torch.float32) if Path(path).is_dir() else load(path)
    cost = model_cost(model)
    sparse = [(block, layer) for block, layer in enumerate(cost.layers) if layer.experts]
    routers = [ffn.router for ffn in sparse_ffns(model)]
    known = _recorded_sparsity(path)
    size = model.config.quantization_config.method.expert_size
    unit = 2 * 1024 / GFLOP
    layers = [
        {
            "block": block,
            "experts": layer.experts,
            "expert_size": size,
            "threshold": router.threshold if router.uses_threshold else None,
            "sparsity": None if known is None else known[index],
            "mflops": {
                "dense": layer.ffn * unit,
                "sparse": None if known is None else layer.multiplies(known[index]) * unit,
                "router": layer.router.multiplies * unit,
            },
            "parameters": {"ffn": layer.ffn, "router": layer.router.parameters},
        }
        for index, ((block, layer), router) in enumerate(zip(sparse, routers, strict=True))
    ]
    gflops: dict[str, float | None] = dict(cost.gflops_per_token(known or [0.0] * len(sparse)))
    read: dict[str, float | None] = dict(cost.bytes_per_token(known or [0.0] * len(sparse)))
    if known is None:
        gflops["sparse"] = read["sparse"] = None
    return {
        "model": path,
        "architecture": type(model).__name__,
        "config": model.config.quantization_config.to_dict(),
        "parameters": parameter_counts(model),
        "sparsity": None if known is None else sum(known) / len(known),
        "gflops_per_token": gflops,
        "bytes_per_token": read,
        "layers": layers,
        "transformers": transformers.__version__,
    }


def _recorded_sparsity(path: str) -> list[float] | None:
    recorded: list[float] | None = read_run(Path(path)).get("sparsity_per_layer")
    return recorded
