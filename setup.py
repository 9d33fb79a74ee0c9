"""Builds the CPU kernels, where there is a C++ compiler; without one the package installs and runs without them."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-w"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
VARIANTS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set into one plain shared library: no Python headers needed."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say in one line why there are no kernels."""
        try:
            self._build(ext)
        except Exception as error:  # noqa: BLE001 - whatever the compiler's trouble, the package works without it
            print(f"lte: the C++ kernels were not built ({error}); the reference will run", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without the interpreter's version: it does not depend on it."""
        return str(Path(*fullname.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")

    def _build(self, ext: Extension) -> None:
        build = Path(self.build_temp)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects: list[str] = []
        macros: list[tuple[str, str]] = []
        for name, flags in VARIANTS.items():
            if flags and not x86:
                continue
            try:
                objects += self.compiler.compile(
                    ["csrc/kernels.cpp"],
                    output_dir=str(build / name),
                    macros=[("LTE_VARIANT", f"lte_{name}")],
                    extra_postargs=[*FLAGS, *flags],
                    depends=ext.depends,
                )
            except Exception as error:
                if not flags:
                    raise
                print(f"lte: no {name} kernels: {error}", file=sys.stderr)
                continue
            macros.append((f"LTE_HAS_{name.upper()}", "1"))
        objects += self.compiler.compile(
            ["csrc/api.cpp", "csrc/threads.cpp"],
            output_dir=str(build),
            macros=macros,
            extra_postargs=["-DLTE_API=1", *FLAGS],
            depends=ext.depends,
        )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), libraries=["dl"] if x86 else [], target_lang="c++")


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "lte.ops.cpu._kernels",
            sources=["csrc/kernels.cpp", "csrc/api.cpp", "csrc/threads.cpp"],
            depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        )
    ],
)
