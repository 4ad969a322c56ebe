"""Builds the library of the installed torch with a C++ compiler: no nvcc, no CUDA toolkit."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
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

# A library of each torch minor version fits in one package: the import picks by name.
LIBRARY = "gradnorm_kernels._C_torch" + "_".join(torch.__version__.split(".")[:2])
CSRC = Path(__file__).parent.resolve() / "csrc"
BINDING = CSRC / "python.cpp"
WINDOWS = sys.platform == "win32"
CXX_FLAGS = ["/O2", "/std:c++20"] if WINDOWS else ["-O3", "-g0", "-std=c++20", "-Wno-unknown-pragmas"]
# Yours come last, since of two levels of optimisation the last one counts.
CXX_FLAGS += os.environ.get("CXXFLAGS", "").split()

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


class BuildUnits(BuildExtension):
    """Compiles csrc in one piece, and csrc/cpu in one for every instruction set.

    Of a file's own 10 to 20 seconds almost all go to torch's headers, which each piece reads once.
    """

    def run(self) -> None:
        super().run()
        # What a build for another torch left there may be older than its sources.
        library = Path(self.get_ext_fullpath(LIBRARY))
        for path in library.parent.glob("_C*"):
            if path != library:
                path.unlink()

    def build_extensions(self) -> None:
        # Without ninja, setuptools would keep a library older than a header, or built for another torch.
        self.force = True
        units = [("HOST", CSRC, [], CXX_FLAGS)]
        for capability, flags in CPU_CAPABILITIES.items():
            macros = [("CPU_CAPABILITY", capability), (f"CPU_CAPABILITY_{capability}", None)]
            units.append((capability, CSRC / "cpu", macros, CXX_FLAGS + flags))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            for objects in pool.map(self.compile_unit, *zip(*units, strict=True)):
                self.extensions[0].extra_objects += objects
        super().build_extensions()

    def compile_unit(self, name: str, folder: Path, macros: list, flags: list[str]) -> list[str]:
        sources = (path for path in sorted(folder.glob("*.cpp")) if path != BINDING)
        unit = Path(self.build_temp, f"{name}.cpp")
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text("".join(f'#include "{path.as_posix()}"\n' for path in sources))
        return self.compiler.compile(
            [str(unit)],
            output_dir=self.build_temp,
            macros=macros,
            include_dirs=include_paths(),
            extra_postargs=flags,
        )


setup(
    ext_modules=[
        CppExtension(
            LIBRARY,
            [os.path.relpath(BINDING)],
            extra_compile_args=CXX_FLAGS,
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildUnits},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
