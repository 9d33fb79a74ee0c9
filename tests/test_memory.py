"""What a process says of its peak memory."""

import subprocess
import sys

import pytest

from lte.memory import peak_memory

TAKE = """
import torch
from lte.memory import peak_memory
before = peak_memory()["host"]
taken = torch.ones(100_000_000)
del taken
print(peak_memory()["host"] - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="not told there")
def test_the_peak_is_that_of_this_process_and_stays():
    process = subprocess.run([sys.executable, "-c", TAKE], capture_output=True, text=True, check=True)
    assert float(process.stdout) == pytest.approx(0.4, abs=0.15)
    assert 0.1 < peak_memory()["host"] < 200
