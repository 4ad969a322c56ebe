"""Swaps the modules of an existing model for their fused counterparts, and back."""

from collections import Counter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from . import functional, modules

__all__ = ["fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)
Replacement = tuple[type[nn.Module], dict[str, Any]]

# Why a class without a fused counterpart needs none, for the report of a dry run.
_NOTHING_TO_GAIN: dict[type[nn.Module], str] = {
    nn.modules.linear.NonDynamicallyQuantizableLinear: "its double backward is matrix products already",
}
# What the layers of torch.nn.Transformer call as their activation.
_FUNCTIONS = {F.gelu: functional.gelu, F.relu: functional.relu, torch.relu: functional.relu}
# In a swapped module: its class before, and attributes as they were.
_RECORD = "_before_fuse"


def fuse(model: Model, *, dry_run: bool = False) -> Model:
    """Swaps the modules of ``model`` that have a fused counterpart, in place, and returns ``model``.

    Each swapped module stays the same object with the same attributes (parameters, buffers, hooks,
    training mode); only its class changes. So ``state_dict``, devices, dtypes, optimisers that hold the
    parameters and handles of registered hooks stay valid, and calling ``fuse`` again changes nothing.
    Subclasses with a ``forward`` of their own are left alone. Modules under
    ``torch.nn.utils.parametrize`` are swapped as they are without. :func:`unfuse` undoes all of it.

    Where an activation follows a batch normalisation, in timm's BatchNormAct2d, its blocks of ResNet and
    ``nn.Sequential``, the two are one op; each is called as it was while one of them has hooks.

    Activations that worked in place return a new tensor. Submodules whose work moves into their parent's
    kernel, an attention's ``softmax`` and ``attn_drop``, a gated unit's ``act``, stay where they are and are
    no longer called, so that hooks on them do not fire.

    Swapped are ``torch.nn``'s BatchNorm, CELU, Conv, CosineSimilarity, CrossEntropyLoss, ELU, GELU, GLU,
    GroupNorm, Hardsigmoid, Hardswish, InstanceNorm, LayerNorm, LeakyReLU, LogSigmoid, LogSoftmax, Mish,
    MultiheadAttention, PairwiseDistance, RMSNorm, ReLU, ReLU6, SELU, SiLU, Sigmoid, Softmax, Softplus,
    Softsign, Tanh and its weight normalisation by ``parametrizations``, pools, reflect and replicate pads,
    Hardtanh, Threshold and the shrinks (whose input gets no zeros for a second derivative), and timm's own
    activations, normalisations with and without an activation (EvoNorm S, filter and global response norm
    too), gated units, attentions, scales of channels (``LayerScale``, ``SqueezeExcite``), ``Conv2dSame``,
    weight-standardised convolutions, Swin's blocks, ``ResNet`` with its blocks, and each of its classes whose
    own code calls a function that has a fused counterpart.

    Args:
        model: any module; itself included in the search.
        dry_run: print what would be swapped and what would be left, and change nothing.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    _check_module("fuse", model)
    replacements = _replacements(model)
    if dry_run:
        print(_report(model, replacements))
        return model
    for module in model.modules():
        if (found := _find(module, replacements)) is not None:
            fused, attributes = found
            before = {name: getattr(module, name) for name in attributes if hasattr(module, name)}
            module.__dict__[_RECORD] = _kind(module), before, list(attributes)
            module.__dict__.update(attributes)
            _become(module, fused)
    return model


def unfuse(model: Model) -> Model:
    """Undoes :func:`fuse`, in place, and returns ``model``: each module has the class and the attributes that
    it had. Modules that were built fused (:class:`FusedGeLU`) stay.

    For tools that look modules up by their exact class: attribution (Captum's DeepLift), quantisation,
    second-order libraries (BackPACK), FLOP counters.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    _check_module("unfuse", model)
    for module in model.modules():
        if _RECORD in module.__dict__:
            kind, before, changed = module.__dict__.pop(_RECORD)
            for name in changed:
                module.__dict__.pop(name, None)
            module.__dict__.update(before)
            _become(module, kind)
    return model


def _replacements(model: nn.Module) -> dict[type[nn.Module], Replacement]:
    replacements: dict[type[nn.Module], Replacement] = {
        kind: (fused, {}) for kind, fused in modules.REPLACEMENTS.items()
    }
    if any(_comes_from_timm(module) for module in model.modules()):
        from . import timm_modules

        replacements |= timm_modules.REPLACEMENTS
    return replacements


def _find(module: nn.Module, replacements: dict[type[nn.Module], Replacement]) -> Replacement | None:
    # timm's own switch to apex kernels and low-precision norms.
    if getattr(module, "_fast_norm", False):
        return None
    kind = _kind(module)
    if kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        activation = _FUNCTIONS.get(module.activation)  # type: ignore[call-overload]
        return None if activation is None else (kind, {"activation": activation})
    if kind is nn.Sequential:
        has_pair = modules.has_pair(module.children(), replacements)
        return (modules.FusedSequential, {}) if has_pair else None
    return replacements.get(kind)


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}")


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class; of a parametrised module, the class that it had before."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # A class of this module alone, which holds its parametrised tensors as properties.
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    module.__class__ = kind


def _comes_from_timm(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "timm"


def _report(model: nn.Module, replacements: dict[type[nn.Module], Replacement]) -> str:
    swapped: Counter[tuple[type, str]] = Counter()
    left: Counter[type] = Counter()
    for module in model.modules():
        kind = _kind(module)
        if (found := _find(module, replacements)) is not None:
            fused, attributes = found
            changes = ", ".join(f"{k} = {getattr(v, '__name__', v)}" for k, v in attributes.items())
            swapped[kind, f": {changes}" if fused is kind else f" -> {fused.__name__}"] += 1
        elif next(module.children(), None) is None and not kind.__module__.startswith(__package__):
            left[kind] += 1
    lines = ["swapped:"]
    lines += [f"  {n:4} {_name(kind)}{how}" for (kind, how), n in swapped.most_common()]
    lines += ["left:"]
    for kind, n in left.most_common():
        reason = _NOTHING_TO_GAIN.get(kind)
        lines.append(f"  {n:4} {_name(kind)}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)


def _name(kind: type) -> str:
    public = "torch.nn" if kind.__module__.startswith("torch.nn.modules.") else kind.__module__
    return f"{public}.{kind.__qualname__}"
