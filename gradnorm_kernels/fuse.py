"""Swaps the modules of an existing model for their fused counterparts."""

from collections import Counter
from typing import Any, TypeVar

from torch import nn

from . import modules

__all__ = ["fuse"]

Model = TypeVar("Model", bound=nn.Module)
Replacement = tuple[type[nn.Module], dict[str, Any]]

# Why a class without a fused counterpart needs none, for the report of a dry run.
_NOTHING_TO_GAIN: dict[type[nn.Module], str] = {
    nn.Linear: "its double backward is matrix products already",
}


def fuse(model: Model, *, dry_run: bool = False) -> Model:
    """Swaps the modules of ``model`` that have a fused counterpart, in place, and returns ``model``.

    Each swapped module stays the same object with the same attributes (parameters, buffers, hooks,
    training mode); only its class changes. So ``state_dict``, devices, dtypes, optimisers that hold the
    parameters and handles of registered hooks stay valid, and calling ``fuse`` again changes nothing.
    Subclasses with a ``forward`` of their own are left alone.

    Activations that worked in place return a new tensor. Submodules whose work moves into their parent's
    kernel, an attention's ``softmax`` and ``attn_drop``, stay where they are and are no longer called, so
    that hooks on them do not fire.

    Swapped are ``torch.nn``'s BatchNorm, Conv, ELU, GELU, GroupNorm, Hardsigmoid, Hardswish, InstanceNorm,
    LayerNorm, LeakyReLU, Mish, RMSNorm, ReLU, ReLU6, SiLU, Sigmoid, Softmax, Softplus and Tanh, and timm's
    own activations, ``LayerNorm``, ``LayerNorm2d``, ``LayerNormFp32``, ``RmsNorm``, ``RmsNorm2d``,
    ``RmsNormFp32``, ``RmsNorm2dFp32``, ``GroupNorm``, ``GroupNorm1``, ``GroupNormAct``, ``BatchNormAct2d``,
    ``Conv2dSame``, ``Attention`` and Swin's ``WindowAttention``. Other attention modules of timm have
    ``fused_attn`` set to False, because PyTorch's fused attention cannot be differentiated twice.

    Args:
        model: any module; itself included in the search.
        dry_run: print what would be swapped and what would be left, and change nothing.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected model to be a torch.nn.Module, got {type(model).__name__}")
    replacements = _replacements(model)
    if dry_run:
        print(_report(model, replacements))
        return model
    for module in model.modules():
        if (found := _find(module, replacements)) is not None:
            fused, attributes = found
            module.__dict__.update(attributes)
            module.__class__ = fused
        elif _has_fused_attention(module):
            module.__dict__["fused_attn"] = False
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
    return None if getattr(module, "_fast_norm", False) else replacements.get(type(module))


def _comes_from_timm(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "timm"


def _has_fused_attention(module: nn.Module) -> bool:
    return _comes_from_timm(module) and getattr(module, "fused_attn", False) is True


def _report(model: nn.Module, replacements: dict[type[nn.Module], Replacement]) -> str:
    swapped: Counter[tuple[type, type]] = Counter()
    unfused: Counter[type] = Counter()
    left: Counter[type] = Counter()
    for module in model.modules():
        kind = type(module)
        if (found := _find(module, replacements)) is not None:
            swapped[kind, found[0]] += 1
        elif _has_fused_attention(module):
            unfused[kind] += 1
        elif next(module.children(), None) is None and not kind.__module__.startswith(__package__):
            left[kind] += 1
    lines = ["swapped:"]
    lines += [f"  {n:4} {_name(kind)} -> {fused.__name__}" for (kind, fused), n in swapped.most_common()]
    lines += [f"  {n:4} {_name(kind)}: fused_attn = False" for kind, n in unfused.most_common()]
    lines += ["left:"]
    for kind, n in left.most_common():
        reason = _NOTHING_TO_GAIN.get(kind)
        lines.append(f"  {n:4} {_name(kind)}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)


def _name(kind: type) -> str:
    public = "torch.nn" if kind.__module__.startswith("torch.nn.modules.") else kind.__module__
    return f"{public}.{kind.__qualname__}"
