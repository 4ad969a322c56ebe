"""A driver of CUDA's that notes launches, in front of the real one by LD_PRELOAD, and Triton on top of it.

Triton's own launcher calls it, compiled as for a GPU. The kernels are not compiled: in place of a cubin the
driver is given the sizes of the kernel's parameters.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import parameter_sizes

from gradnorm_kernels import kernels

# Its path, in the processes that have it.
LIBRARY = "GRADNORM_KERNELS_STAND_IN"

SOURCE = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

typedef struct { int count, sizes[128]; } Function;
typedef struct {
  unsigned grid[3], block[3], shared_memory;
  void *stream, *function, *context;
  int count;
  unsigned long long parameters[128];
} Launch;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread void* context;
Launch stand_in_launches[256];
int stand_in_count, stand_in_error;

static int note(unsigned* shape, unsigned shared_memory, void* stream, void* function, void** parameters) {
  pthread_mutex_lock(&mutex);
  Launch* launch = &stand_in_launches[stand_in_count++ % 256];
  memset(launch, 0, sizeof *launch);
  memcpy(launch->grid, shape, 6 * sizeof(unsigned));
  launch->shared_memory = shared_memory;
  launch->stream = stream;
  launch->function = function;
  launch->context = context;
  launch->count = ((Function*)function)->count;
  for (int i = 0; i < launch->count; ++i) {
    memcpy(&launch->parameters[i], parameters[i], ((Function*)function)->sizes[i]);
  }
  pthread_mutex_unlock(&mutex);
  return stand_in_error;
}
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared_memory, CUstream stream, void** parameters,
                        void** extra) {
  unsigned shape[] = {x, y, z, bx, by, bz};
  return note(shape, shared_memory, stream, f, parameters);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void** extra) {
  unsigned shape[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ};
  return c->numAttrs ? CUDA_ERROR_NOT_SUPPORTED : note(shape, c->sharedMemBytes, c->hStream, f, parameters);
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = malloc(sizeof(Function));
  memcpy(*module, image, sizeof(Function));
  return 0;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return 0;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 9;
  return 0;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return 0;
}
CUresult cuGetErrorString(CUresult code, const char** text) { *text = "of a stand-in"; return 0; }
CUresult cuCtxGetCurrent(CUcontext* current) { *current = context; return 0; }
CUresult cuCtxSetCurrent(CUcontext wanted) { context = wanted; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) {
  *retained = (CUcontext)&mutex;
  return 0;
}
"""


def build(folder: Path) -> Path:
    import triton

    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    # All others that Triton links.
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", (nvidia / "driver.c").read_text()))
    rest = [name for name in sorted(names) if f"{name}(" not in SOURCE and not name.endswith("Handle")]
    source, library = folder / "stand_in.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    others = folder / "others.c"
    others.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in rest))
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{nvidia / 'include'}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, source, others, "-o", library], check=True)
    return library


def environment(folder: Path) -> dict[str, str]:
    """Of a process that has it and repeats launches."""
    path = str(build(folder))
    return {
        "LD_PRELOAD": path,
        LIBRARY: path,
        kernels.REPLAY: "1",
        "TRITON_LIBCUDA_PATH": str(folder),
        # Of Triton's launcher, linked with it.
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }


class Noted(NamedTuple):
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_memory: int
    stream: int | None
    function: int
    context: int | None
    parameters: tuple[int, ...]


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("parameters", ctypes.c_uint64 * 128),
    )


def library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[LIBRARY])


def take_launches() -> list[Noted]:
    """Those since the last call."""
    count = ctypes.c_int.in_dll(library(), "stand_in_count")
    launches = (_Launch * 256).in_dll(library(), "stand_in_launches")
    count.value, noted = 0, min(count.value, 256)
    return [
        Noted(
            *(tuple(launch.grid), tuple(launch.block), launch.shared_memory, launch.stream, launch.function),
            *(launch.context, tuple(launch.parameters[: launch.count])),
        )
        for launch in launches[:noted]
    ]


@contextlib.contextmanager
def failing(error: int) -> Iterator[None]:
    """Its launches, with CUDA's number of an error."""
    code = ctypes.c_int.in_dll(library(), "stand_in_error")
    code.value = error
    yield
    code.value = 0


def install(folder: Path) -> None:
    """Have Triton launch what it has not compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

    @triton.jit
    def empty_kernel(n):
        pass

    target = GPUTarget("cuda", 90, 32)
    source = triton.compiler.ASTSource(empty_kernel, {"n": "i32"}, {}, {})
    real = triton.compile(source, target=target)
    template = json.loads(
        next(Path(p) for n, p in real.metadata_group.items() if n[-5:] == ".json").read_text()
    )

    def not_compiled(src: Any, target: Any, options: Any, **_: Any) -> Any:
        of_kernel = {
            "name": src.fn.__name__,
            "num_warps": options["num_warps"],
            "shared": 8 * len(src.signature),
        }
        # Two pointers of Triton's own come last.
        sizes = [*parameter_sizes(src.signature.values()), 8, 8]
        number = next(numbers)  # of each thread's
        files = {f"{number}.{kind}": folder / f"{number}.{kind}" for kind in ("json", "cubin")}
        files[f"{number}.json"].write_text(json.dumps(template | of_kernel))
        files[f"{number}.cubin"].write_bytes(
            struct.pack("129i", len(sizes), *sizes, *[0] * (128 - len(sizes)))
        )
        return triton.compiler.CompiledKernel(src, {name: str(path) for name, path in files.items()}, "hash")

    numbers = itertools.count()
    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = not_compiled
