"""Sparse FFN modules and routers. PyTorch only."""

from lte.nn.copies import CopyRouter
from lte.nn.ffn import Mode, RoutingObserver, SparseFFN, SplitSparseFFN, unsaid
from lte.nn.learned_planes import LearnedPlanes
from lte.nn.linear import FastLinear
from lte.nn.nested import NestedDown, NestedLinear
from lte.nn.observe import SparsityMeter, observe_routing, set_mode, sparse_ffns
from lte.nn.projections import DeferredLinear
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
    read_thresholds,
)
from lte.nn.routing import ConstantForm, CopyForm, Form, HalfForm, LinearForm, NestedForm, RouterCost, Routing
from lte.nn.thresholded import Thresholded, threshold_inputs

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
    "LearnedPlanes",
    "LinearForm",
    "LookingRouter",
    "LowRankRouter",
    "Mode",
    "NestedDown",
    "NestedForm",
    "NestedLinear",
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
    "Thresholded",
    "TiedHead",
    "TopKSoftmaxRouter",
    "largest",
    "observe_routing",
    "read_thresholds",
    "set_mode",
    "sparse_ffns",
    "threshold_inputs",
    "unsaid",
]
