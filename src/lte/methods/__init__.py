"""Sparsity methods, one file each: a config and the router it gives every FFN."""

from lte.methods.bank_topk import BankTopKConfig
from lte.methods.cats import CATSConfig
from lte.methods.cmoe import CMoEConfig
from lte.methods.countdown import CountdownConfig
from lte.methods.dejavu import DejaVuConfig
from lte.methods.dsmoe import DSMoEConfig
from lte.methods.kla import KLAConfig
from lte.methods.lte import LTEConfig
from lte.methods.moefication import MoEficationConfig
from lte.methods.oracle import OracleConfig
from lte.methods.prune import PruneFLAPConfig, PruneMagnitudeConfig, PruneWandaConfig
from lte.methods.random_router import RandomRouterConfig
from lte.methods.relufication import ReLUficationConfig
from lte.methods.self_prediction import SelfPredictionConfig
from lte.methods.sparseinfer import SparseInferConfig
from lte.methods.svd import SVDConfig
from lte.methods.teal import TEALConfig
from lte.methods.topk import TopKConfig
from lte.methods.wina import WINAConfig

__all__ = [
    "BankTopKConfig",
    "CATSConfig",
    "CMoEConfig",
    "CountdownConfig",
    "DSMoEConfig",
    "DejaVuConfig",
    "KLAConfig",
    "LTEConfig",
    "MoEficationConfig",
    "OracleConfig",
    "PruneFLAPConfig",
    "PruneMagnitudeConfig",
    "PruneWandaConfig",
    "RandomRouterConfig",
    "ReLUficationConfig",
    "SVDConfig",
    "SelfPredictionConfig",
    "SparseInferConfig",
    "TEALConfig",
    "TopKConfig",
    "WINAConfig",
]
