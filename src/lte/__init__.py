"""lte: turn a dense Hugging Face transformer into a contextually sparse one, and run it."""

from typing import TYPE_CHECKING, Any

import lte.quiet  # noqa: F401 - before anything imports transformers

# isort: split
from lte.families import FFNSpec, register_family
from lte.hub import load, load_dense, load_tokenizer, require_sparse
from lte.inference import prepare_for_inference
from lte.methods import (
    BankTopKConfig,
    CATSConfig,
    CMoEConfig,
    CountdownConfig,
    DejaVuConfig,
    DSMoEConfig,
    KLAConfig,
    LTEConfig,
    LTEPaperConfig,
    MoEficationConfig,
    OracleConfig,
    PruneFLAPConfig,
    PruneMagnitudeConfig,
    PruneTaylorConfig,
    PruneWandaConfig,
    RandomRouterConfig,
    ReLUficationConfig,
    SelfPredictionConfig,
    SparseInferConfig,
    SVDConfig,
    TEALConfig,
    TopKConfig,
    WandaConfig,
    WINAConfig,
)
from lte.nn import SparsityMeter, observe_routing, set_mode
from lte.quantization import quantize
from lte.sparsify import sparsify
from lte.thresholds import calibrate, set_sparsity
from lte.tuning import tune_quantized

if TYPE_CHECKING:
    from lte.training import LTETrainer, LTETrainingArguments

__all__ = [
    "BankTopKConfig",
    "CATSConfig",
    "CMoEConfig",
    "CountdownConfig",
    "DSMoEConfig",
    "DejaVuConfig",
    "FFNSpec",
    "KLAConfig",
    "LTEConfig",
    "LTEPaperConfig",
    "LTETrainer",
    "LTETrainingArguments",
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
    "SparsityMeter",
    "TEALConfig",
    "TopKConfig",
    "WINAConfig",
    "WandaConfig",
    "calibrate",
    "load",
    "load_dense",
    "load_tokenizer",
    "observe_routing",
    "prepare_for_inference",
    "quantize",
    "register_family",
    "require_sparse",
    "set_mode",
    "set_sparsity",
    "sparsify",
    "tune_quantized",
]


def __getattr__(name: str) -> Any:
    """Import the trainer when it is first asked for: with it come seconds of imports that inference does not need."""
    if name in ("LTETrainer", "LTETrainingArguments"):
        import lte.training

        return getattr(lte.training, name)
    raise AttributeError(f"module 'lte' has no attribute {name!r}")
