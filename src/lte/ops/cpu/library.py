"""The shared library and its C types; the other side of ``csrc/lte.h``."""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute with, and the numbers ``lte.h`` gives them."""

ACTIVATION_CODES = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "identity": 4}


class LowBit(ctypes.Structure):
    """``lte_lowbit``."""

    _fields_ = (
        ("planes", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("groups", c_int64),
        ("group", c_int64),
        ("bits", c_int32),
        ("by_columns", c_int32),
    )


class Matrix(ctypes.Structure):
    """``lte_matrix``."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("stride", c_int64),
        ("low", LowBit),
    )


class Copy(ctypes.Structure):
    """``lte_copy``."""

    _fields_ = (("gate", LowBit), ("up", LowBit), ("norms", c_void_p), ("cut", c_float))


class Rows(ctypes.Structure):
    """``lte_rows``."""

    _fields_ = (("codes", c_void_p), ("bits", c_int32))


class Nested(ctypes.Structure):
    """``lte_nested``."""

    _fields_ = (
        ("gate", Rows),
        ("up", Rows),
        ("down", Rows),
        ("down_lower", Rows),
        ("down_scales", c_void_p),
        ("down_groups", c_int64),
        ("down_group", c_int64),
        ("exact", c_void_p),
        ("exact_rows", c_void_p),
        ("n_exact", c_int64),
        ("fine_cut", c_float),
    )


class FFN(ctypes.Structure):
    """``lte_ffn``."""

    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("router", Matrix),
        ("copy", Copy),
        ("nested", Nested),
        ("d_model", c_int64),
        ("d_ff", c_int64),
        ("n_experts", c_int64),
        ("threshold", c_float),
        ("dtype", c_int32),
        ("activation", c_int32),
    )


class Layer(ctypes.Structure):
    """``lte_layer``."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Matrix * 3),
        ("output", Matrix),
        ("ffn", FFN),
        ("all_experts", c_int32),
    )


class Decoder(ctypes.Structure):
    """``lte_decoder``."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("n_layers", c_int64),
        ("d_model", c_int64),
        ("n_heads", c_int64),
        ("n_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("norm_eps", c_float),
        ("norm_offset", c_float),
        ("scaling", c_float),
        ("dtype", c_int32),
    )


class Cache(ctypes.Structure):
    """``lte_cache``."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    )


class Step(ctypes.Structure):
    """``lte_step``."""

    _fields_ = (
        ("batch", c_int64),
        ("position", c_int64),
        ("hidden", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
        ("caches", POINTER(Cache)),
        ("logits", c_void_p),
        ("from_part", c_int64),
        ("to_part", c_int64),
        ("inputs", c_void_p),
        ("scale", c_void_p),
    )


def matrix(weight: Tensor | None, bias: Tensor | None = None) -> Matrix:
    """A [rows, cols] weight with contiguous rows, and its bias; pointers only, the caller keeps the tensors."""
    pointer = None if bias is None else bias.data_ptr()
    if weight is None:
        return Matrix(None, pointer, 0, 0, 0, LowBit())
    return Matrix(weight.data_ptr(), pointer, *weight.shape, weight.stride(0), LowBit())


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    found = sorted(Path(__file__).parent.glob("_kernels.*"))
    if not found:
        return None, "the C++ kernels were not built (install with a C++ compiler present)"
    library, reason = open_library(found[0])
    if library is not None and not library.lte_shares_threads():
        logger.warning("the C++ kernels run on one thread: torch's OpenMP threads (libgomp) are not in this process")
    return library, reason


def open_library(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library at a path, its functions typed; or None and the reason."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the C++ kernels do not load: {error}"
    library.lte_isa.restype = c_char_p
    library.lte_use_isa.argtypes = [c_char_p]
    library.lte_shares_threads.restype = c_int32
    library.lte_sparse_ffn.argtypes = [POINTER(FFN), c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int32]
    library.lte_sparse_ffn.restype = None
    library.lte_copy_scores.argtypes = [POINTER(FFN), c_void_p, c_int64, c_void_p, c_int32]
    library.lte_copy_scores.restype = None
    library.lte_linear.argtypes = [POINTER(Matrix), c_int32, c_void_p, c_int64, c_void_p, c_int32]
    library.lte_linear.restype = None
    library.lte_decode.argtypes = [POINTER(Decoder), POINTER(Step), c_int32]
    library.lte_decode.restype = None
    library.lte_quantize.argtypes = [POINTER(Matrix), c_int32, POINTER(LowBit), c_void_p, c_int32, c_int32]
    library.lte_quantize.restype = None
    library.lte_dequantize.argtypes = [POINTER(LowBit), c_int32, c_void_p, c_int32]
    library.lte_dequantize.restype = None
    library.lte_read.argtypes = [c_void_p, c_int64, c_int32]
    library.lte_read.restype = c_float
    return library, ""


def unavailable() -> str:
    """Why the kernels cannot run, in words; empty where they can."""
    return _open()[1]


def kernels() -> ctypes.CDLL:
    """The library; call only where :func:`unavailable` is empty."""
    library = _open()[0]
    assert library is not None
    return library


def instruction_set() -> str:
    """Which copy of the kernels runs: ``avx512_bf16``, ``avx512``, ``avx2`` or ``generic``; ``none`` without them."""
    return "none" if unavailable() else str(kernels().lte_isa().decode())
