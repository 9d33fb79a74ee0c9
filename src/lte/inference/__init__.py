"""Making a sparse model fast: ``prepare_for_inference``."""

from lte.inference.crossover import Crossover
from lte.inference.prepare import prepare_for_inference, restore

__all__ = ["Crossover", "prepare_for_inference", "restore"]
