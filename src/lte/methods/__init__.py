"""Sparsity methods, one file each: a config and the router it gives every FFN."""

from lte.methods.bank_topk import BankTopKConfig
from lte.methods.cats import CATSConfig
from lte.methods.cmoe import CMoEConfig
from lte.methods.countdown import CountdownConfig
from lte.methods.dejavu import DejaVuConfig
from lte.methods.dense import DenseConfig
from lte.methods.dsmoe import DSMoEConfig
from lte.methods.kla import KLAConfig
from lte.methods.lte import LTEConfig, LTEPaperConfig
from lte.methods.moefication import MoEficationConfig
from lte.methods.oracle import OracleConfig
from lte.methods.prune import PruneFLAPConfig, PruneMagnitudeConfig, PruneTaylorConfig, PruneWandaConfig
from lte.methods.random_router import RandomRouterConfig
from lte.methods.relufication import ReLUficationConfig
from lte.methods.self_prediction import SelfPredictionConfig
from lte.methods.softmax_topk import TopKConfig
from lte.methods.sparseinfer import SparseInferConfig
from lte.methods.svd import SVDConfig
from lte.methods.teal import TEALConfig
from lte.methods.wanda import WandaConfig
from lte.methods.wina import WINAConfig

__all__ = [
    "BankTopKConfig",
    "CATSConfig",
    "CMoEConfig",
    "CountdownConfig",
    "DSMoEConfig",
    "DejaVuConfig",
    "DenseConfig",
    "KLAConfig",
    "LTEConfig",
    "LTEPaperConfig",
    "MoEficationConfig",
    "OracleConfig",
    "PruneFLAPConfig",
    "PruneMagnitudeConfig",
    "PruneTaylorConfig",
    "PruneWandaConfig",
    "RandomRouterConfig",
    "ReLUficationConfig",
    "SVDConfig",
    "SelfPredictionConfig",
    "SparseInferConfig",
    "TEALConfig",
    "TopKConfig",
    "WINAConfig",
    "WandaConfig",
]
