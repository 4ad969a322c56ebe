"""Builds gradnorm_kernels._C with a C++ compiler and the installed torch: no nvcc, no CUDA toolkit."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import setuptools
from setuptools import setup

INSTALL = 'pip install "setuptools>=77" ninja\n    pip install --no-build-isolation .'

if int(setuptools.__version__.split(".")[0]) < 77:
    found = setuptools.__version__
    sys.exit(f"gradnorm_kernels needs setuptools 77 or later, found {found}. Run:\n    {INSTALL}")
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    sys.exit(
        "gradnorm_kernels is built against the torch you run it with, and this build environment has none.\n"
        f"Install torch (2.11 to 2.15), then run:\n    {INSTALL}"
    )

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
WINDOWS = sys.platform == "win32"
CXX_FLAGS = ["/O2", "/std:c++20"] if WINDOWS else ["-O3", "-g0", "-std=c++20", "-Wno-unknown-pragmas"]

# PyTorch's own flags for its CPU kernels. The baseline comes first: where an inline function is compiled
# more than once the linker keeps the first, which must run on every machine.
X86_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["/arch:AVX2"] if WINDOWS else ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["/arch:AVX512"]
    if WINDOWS
    else ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
CPU_CAPABILITIES = X86_FLAGS if IS_X86 else {"DEFAULT": []}


class BuildPerCapability(BuildExtension):
    """Compiles csrc/cpu once for every instruction set, and the rest once."""

    def run(self) -> None:
        super().run()
        # Beside the library: what the import compares with the torch it finds.
        package = Path(self.get_ext_fullpath("gradnorm_kernels._C")).parent
        (package / "_built_for.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    def build_extensions(self) -> None:
        # Without ninja, setuptools would keep a library older than a header, or built for another torch.
        self.force = True
        sources = sorted(os.path.relpath(path) for path in (CSRC / "cpu").glob("*.cpp"))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            for objects in pool.map(self.compile_for, *zip(*product(CPU_CAPABILITIES, sources), strict=True)):
                self.extensions[0].extra_objects += objects
        super().build_extensions()

    def compile_for(self, capability: str, source: str) -> list[str]:
        return self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, capability),
            macros=[("CPU_CAPABILITY", capability), (f"CPU_CAPABILITY_{capability}", None)],
            include_dirs=include_paths(),
            extra_postargs=[*CXX_FLAGS, *CPU_CAPABILITIES[capability]],
        )


setup(
    ext_modules=[
        CppExtension(
            "gradnorm_kernels._C",
            sorted(os.path.relpath(path) for path in CSRC.glob("*.cpp")),
            extra_compile_args=CXX_FLAGS,
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildPerCapability},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
