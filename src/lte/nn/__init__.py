"""Sparse FFN modules and routers. PyTorch only."""

from lte.nn.copies import CopyRouter
from lte.nn.ffn import DeferredLinear, Mode, RoutingObserver, SparseFFN, SplitSparseFFN
from lte.nn.linear import FastLinear
from lte.nn.observe import SparsityMeter, observe_routing, set_mode, sparse_ffns
from lte.nn.router import (
    ROUTER_DTYPE,
    CopyForm,
    FixedShareRouter,
    KeepLargestRouter,
    LinearForm,
    LookingRouter,
    LowRankRouter,
    PredictorRouter,
    Router,
    RouterCost,
    Routing,
    ScoreRouter,
    ThresholdRouter,
    TopKSoftmaxRouter,
    largest,
)

__all__ = [
    "ROUTER_DTYPE",
    "CopyForm",
    "CopyRouter",
    "DeferredLinear",
    "FastLinear",
    "FixedShareRouter",
    "KeepLargestRouter",
    "LinearForm",
    "LookingRouter",
    "LowRankRouter",
    "Mode",
    "PredictorRouter",
    "Router",
    "RouterCost",
    "Routing",
    "RoutingObserver",
    "ScoreRouter",
    "SparseFFN",
    "SparsityMeter",
    "SplitSparseFFN",
    "ThresholdRouter",
    "TopKSoftmaxRouter",
    "largest",
    "observe_routing",
    "set_mode",
    "sparse_ffns",
]
