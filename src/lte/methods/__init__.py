"""Sparsity methods, one file each: a config and the router it gives every FFN."""

from lte.methods.lte import LTEConfig

__all__ = ["LTEConfig"]
