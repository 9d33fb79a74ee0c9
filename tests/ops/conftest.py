"""What the tests of kernels share."""

from __future__ import annotations

import pytest

from lte.ops import cpu


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def isa(request):
    """Each copy of the kernels in turn, where this processor and build have it."""
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    best = cpu.instruction_set()
    if not cpu.kernels().lte_use_isa(request.param.encode()):
        pytest.skip(f"this processor or build lacks {request.param}")
    yield request.param
    cpu.kernels().lte_use_isa(best.encode())
