"""The kernels as launched on an A100, a 3090 and an H100, compiled without a GPU: no spills, shared memory in bounds.

Compiled in a process of its own, since another test may have imported Triton as an interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("compiling the Triton kernels needs the triton package", allow_module_level=True)

# Capability, SMs, and the shared memory one program may use (CUDA programming guide, table of compute capabilities).
ARCHITECTURES = {80: (108, 163 * 1024), 86: (82, 99 * 1024), 90: (132, 227 * 1024)}
LLAMA, TINY, OPT = (4096, 11008, 32), (2048, 5632, 32), (768, 3072, 24)
CASES = [
    # shape, dtype, gated, activation, tokens, float expert weights
    (LLAMA, "bfloat16", True, "silu", 1, False),
    (LLAMA, "bfloat16", True, "silu", 16, False),
    (LLAMA, "bfloat16", True, "silu", 64, False),
    (TINY, "float32", True, "silu", 1, False),
    (TINY, "float32", True, "silu", 64, True),
    (OPT, "float16", False, "relu", 1, True),
    (OPT, "float16", False, "gelu", 16, False),
]
PLANES = [(4, 0), (4, 4), (3, 1)]
"""Bits of the upper and the lower plane."""

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "uint8": "*u8", "int32": "*i32"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_without_spills(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__, str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    usage = [json.loads(line) for line in run.stdout.splitlines()]
    few_bits = 6 + 2 * len(PLANES)
    assert len(usage) == 4 * len(CASES) + few_bits * sum(dtype != "float32" for _, dtype, *_ in CASES)
    limit = ARCHITECTURES[capability][1]
    assert [row for row in usage if row["stack"] or row["local"] or row["shared"] > limit] == []


def compile_launch(launch: Any, capability: int) -> Any:
    """Compile what ``launch`` would run, as Triton would specialise it for these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = launch.kernel.arg_names
    types, constants, attributes = dict.fromkeys(launch.constants, "constexpr"), dict(launch.constants), {}
    runtime = [name for name in names if name not in launch.constants]
    for name, value in zip(runtime, launch.args, strict=True):
        aligned = isinstance(value, torch.Tensor)
        if value is None:
            types[name], constants[name] = "constexpr", None
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[str(value.dtype).removeprefix("torch.")]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32"
            aligned = name != "n_tokens" and value % 16 == 0
        if aligned:
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, {name: types[name] for name in names}, constants, attributes)
    options = {"num_warps": launch.warps} | ({"launch_pdl": True} if launch.dependent else {})
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory, which are where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {name: found[name] for name in ("reg", "stack", "local")}


def launches(capability: int) -> Any:
    """Yield every case and its four launches, on tensors without memory."""
    from lte.ops import FFNCopy, FFNWeights, LowBitMatrix, QuantizedFFN
    from lte.ops.triton import configs, launch, nested, quantized

    gpu = configs.GPU("compiled for", (capability // 10, capability % 10), ARCHITECTURES[capability][0])
    for (d, f, n), dtype_name, gated, activation, n_tokens, scaled in CASES:
        dtype = getattr(torch, dtype_name)

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def lowbit(rows: int, columns: int, bits: int = 3, tensor: Any = tensor) -> LowBitMatrix:
            planes = tensor(rows // 16, columns // 64, 2, bits, 64, dtype=torch.uint8)
            return LowBitMatrix(planes, tensor(rows // 16, columns // 64, 16, dtype=torch.bfloat16), rows, columns)

        def small(f: int, d: int, x: Any, mask: Any, gated: bool, activation: str, sms: int) -> Iterator[Any]:
            for bits in (4, 8):
                up, down = (codes(*shape, bits) for shape in ((f, d), (d, f)))
                made = QuantizedFFN(up, down, up if gated else None, activation=activation)
                yield from quantized.ffn_launches(x, made, mask, sms)[1]
                out = tensor(len(x), f)
                yield quantized.rows_launch(x, up, None, out[0], None, None, out, None)

        def codes(rows: int, columns: int, bits: int, tensor: Any = tensor) -> LowBitMatrix:
            planes = tensor(rows // 16, columns // 32, 1, bits, 64, dtype=torch.uint8)
            return LowBitMatrix(planes, tensor(rows // 16, columns // 32, 16, dtype=torch.bfloat16), rows, columns)

        weights = FFNWeights(
            up=tensor(f, d), down=tensor(f, d), gate=tensor(f, d) if gated else None,
            up_bias=None if gated else tensor(f), down_bias=None if gated else tensor(d), activation=activation,
        )  # fmt: skip
        x, mask = tensor(n_tokens, d), tensor(n_tokens, f // n, dtype=torch.uint8)
        config = configs.default_config(gpu, launch.problem_of(x, weights, mask))
        router_weight, router_bias = tensor(f // n, d, dtype=torch.float32), tensor(f // n, dtype=torch.float32)
        router = launch.router_launch(x, router_weight, router_bias, 0.5, mask, pdl=config.pdl)
        scales = tensor(n_tokens, f // n, dtype=torch.float32) if scaled else mask
        _, ffn = launch.ffn_launches(x, weights, scales, config, gpu.sms, after_router=True)
        copy = FFNCopy(lowbit(f, d), tensor(f, dtype=torch.float32), lowbit(f, d) if gated else None)
        scores = launch.copy_scores_launch(x, copy, weights, tensor(n_tokens, f, dtype=torch.float32))
        few_bits = [] if dtype_name == "float32" else list(small(f, d, x, mask, gated, activation, gpu.sms))
        for upper, lower in [] if dtype_name == "float32" else PLANES:
            made = two_planes(tensor, f, d, upper, lower, gated, activation)
            few_bits += nested.nested_launches(x, made, 0.1, 0.2, gpu.sms)[1]
        for one in (router, scores, *ffn, *few_bits):
            yield f"{dtype_name} {activation} T={n_tokens}", one


def two_planes(tensor: Any, f: int, d: int, upper: int, lower: int, gated: bool, activation: str) -> Any:
    """An FFN in two planes of so many bits."""
    from lte.ops import FFNCopy, LowBitMatrix
    from lte.ops.nested import NestedFFN, NestedRows, RowCodes

    def rows(bits: int) -> Any:
        return RowCodes.of(tensor(f, d // 8 * bits, dtype=torch.uint8), d) if bits else None

    def tiles() -> LowBitMatrix:
        planes = tensor(f // 16, d // 64, 2, upper, 64, dtype=torch.uint8)
        return LowBitMatrix(planes, tensor(f // 16, d // 64, 16, dtype=torch.bfloat16), f, d)

    exact, exact_rows = tensor(4, dtype=torch.int32), tensor(4, d, dtype=torch.bfloat16)
    return NestedFFN(
        copy=FFNCopy(tiles(), tensor(f, dtype=torch.float32), tiles() if gated else None),
        down=NestedRows(rows(upper), rows(lower), tensor(f, d // 64, dtype=torch.bfloat16), 64, exact, exact_rows),
        up_lower=rows(lower),
        gate_lower=rows(lower) if gated else None,
        down_bias=None if gated else tensor(d),
        activation=activation,
    )


if __name__ == "__main__":
    for case, one in launches(int(sys.argv[1])):
        compiled = compile_launch(one, int(sys.argv[1]))
        name = one.kernel.__name__
        print(json.dumps({"case": case, "kernel": name, "shared": compiled.metadata.shared, **resources(compiled)}))
