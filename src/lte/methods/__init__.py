"""Sparsity methods, one file each: a config and the router it gives every FFN."""

from lte.methods.cats import CATSConfig
from lte.methods.lte import LTEConfig
from lte.methods.oracle import OracleConfig
from lte.methods.self_prediction import SelfPredictionConfig
from lte.methods.svd import SVDConfig
from lte.methods.topk import TopKConfig

__all__ = ["CATSConfig", "LTEConfig", "OracleConfig", "SVDConfig", "SelfPredictionConfig", "TopKConfig"]
