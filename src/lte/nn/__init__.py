"""Sparse FFN modules and routers. PyTorch only."""

from lte.nn.copies import CopyRouter
from lte.nn.ffn import DeferredLinear, Mode, RoutingObserver, SparseFFN, SplitSparseFFN
from lte.nn.linear import FastLinear
from lte.nn.observe import SparsityMeter, observe_routing, set_mode, sparse_ffns
from lte.nn.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, TiedHead
from lte.nn.router import (
    ROUTER_DTYPE,
    FixedShareRouter,
    KeepLargestRouter,
    LookingRouter,
    LowRankRouter,
    PredictorRouter,
    Router,
    ScoreRouter,
    ThresholdRouter,
    TopKSoftmaxRouter,
    largest,
)
from lte.nn.routing import ConstantForm, CopyForm, Form, HalfForm, LinearForm, RouterCost, Routing

__all__ = [
    "ROUTER_DTYPE",
    "ConstantForm",
    "CopyForm",
    "CopyRouter",
    "DeferredLinear",
    "FastLinear",
    "FixedShareRouter",
    "Form",
    "HalfForm",
    "KeepLargestRouter",
    "LinearForm",
    "LookingRouter",
    "LowRankRouter",
    "Mode",
    "PredictorRouter",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "Router",
    "RouterCost",
    "Routing",
    "RoutingObserver",
    "ScoreRouter",
    "SparseFFN",
    "SparsityMeter",
    "SplitSparseFFN",
    "ThresholdRouter",
    "TiedHead",
    "TopKSoftmaxRouter",
    "largest",
    "observe_routing",
    "set_mode",
    "sparse_ffns",
]
