"""Fused forward, backward and double-backward kernels for PyTorch.

>>> import gradnorm_kernels as gk
>>> gk.fuse(model)                       # swap the modules of an existing model, in place
>>> gk.FusedGeLU()                       # or build with them: nn.GELU's and timm's act_layer signature
>>> gk.functional.gelu(x)                # torch.nn.functional's signatures
>>> gk.set_fused_double_backward(True)   # or leave the code alone and speed up PyTorch's own ops
"""

from importlib.metadata import version as _version

from . import _load, functional, kernels, modules
from .checkpoint import checkpoint, checkpoint_modules
from .compile import compile, compile_modules
from .diagnose import Diagnosis, Finding, diagnose
from .fuse import fuse, unfuse
from .modules import *  # noqa: F403
from .switch import is_fused_double_backward_enabled, set_fused_double_backward

__all__ = [
    *modules.__all__,
    "Diagnosis",
    "Finding",
    "checkpoint",
    "checkpoint_modules",
    "compile",
    "compile_modules",
    "diagnose",
    "functional",
    "fuse",
    "is_fused_double_backward_enabled",
    "set_fused_double_backward",
    "unfuse",
]

_load.load()
kernels.register()
__version__ = _version("gradnorm_kernels")
