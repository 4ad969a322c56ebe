"""Swaps the modules of an existing model for their fused counterparts."""

from typing import Any, TypeVar

from torch import nn

from .modules import FusedGeLU

__all__ = ["fuse"]

Model = TypeVar("Model", bound=nn.Module)

# By name, so that timm is not imported. Each entry: the fused class, and the attributes that it needs and the
# original lacks.
_FUSED: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "torch.nn.modules.activation.GELU": (FusedGeLU, {}),
    "timm.layers.activations.GELU": (FusedGeLU, {"approximate": "none"}),
    "timm.layers.activations.GELUTanh": (FusedGeLU, {"approximate": "tanh"}),
}


def fuse(model: Model) -> Model:
    """Swaps the modules of ``model`` that have a fused counterpart, in place, and returns ``model``.

    Each swapped module stays the same object with the same attributes (parameters, buffers, hooks,
    training mode); only its class changes. So ``state_dict``, devices, dtypes, optimisers that hold the
    parameters and handles of registered hooks stay valid, and calling ``fuse`` again changes nothing.
    Subclasses with a ``forward`` of their own are left alone.

    Swapped: ``torch.nn.GELU``, ``timm.layers.GELU`` and ``timm.layers.GELUTanh`` for
    :class:`~gradnorm_kernels.FusedGeLU`.

    Args:
        model: any module; itself included in the search.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected model to be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        kind = type(module)
        if (found := _FUSED.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            fused, attributes = found
            module.__dict__.update(attributes)
            module.__class__ = fused
    return model
