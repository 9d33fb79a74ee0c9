"""lte: turn a dense Hugging Face transformer into a contextually sparse one, and run it."""

from lte.families import FFNSpec, register_family
from lte.hub import load, require_sparse
from lte.methods import LTEConfig
from lte.nn import SparsityMeter, observe_routing, set_mode
from lte.sparsify import sparsify
from lte.training import LTETrainer, LTETrainingArguments

__all__ = [
    "FFNSpec",
    "LTEConfig",
    "LTETrainer",
    "LTETrainingArguments",
    "SparsityMeter",
    "load",
    "observe_routing",
    "register_family",
    "require_sparse",
    "set_mode",
    "sparsify",
]
