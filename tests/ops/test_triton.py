"""The Triton kernels against the oracle: on a GPU where there is one, otherwise under Triton's interpreter.

Whether Triton interprets is fixed when it is imported, which other tests may have done. Without a GPU the cases
therefore run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels need the triton package", allow_module_level=True)

if torch.cuda.is_available():
    from tests.ops.triton_cases import *  # noqa: F403

else:

    @pytest.mark.slow
    @pytest.mark.skipif(
        metadata.version("triton").startswith("3.6") and int(metadata.version("numpy").split(".")[1]) >= 4,
        reason="the interpreter of Triton 3.6 cannot loop under NumPy 2.4",
    )
    def test_kernels_under_the_interpreter():
        cases = Path(__file__).with_name("triton_cases.py")
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
        inner = subprocess.run(
            command, env=environment, cwd=cases.parents[2], capture_output=True, text=True, timeout=600
        )
        assert inner.returncode == 0, inner.stdout[-6000:] + inner.stderr[-2000:]
