"""Sparse FFN modules and routers. PyTorch only."""

from lte.nn.ffn import DeferredLinear, Mode, RoutingObserver, SparseFFN, SplitSparseFFN
from lte.nn.linear import FastLinear
from lte.nn.observe import SparsityMeter, observe_routing, set_mode, sparse_ffns
from lte.nn.router import Routing, ThresholdRouter

__all__ = [
    "DeferredLinear",
    "FastLinear",
    "Mode",
    "Routing",
    "RoutingObserver",
    "SparseFFN",
    "SparsityMeter",
    "SplitSparseFFN",
    "ThresholdRouter",
    "observe_routing",
    "set_mode",
    "sparse_ffns",
]
