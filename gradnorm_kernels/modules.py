"""Drop-ins for ``torch.nn`` modules, built on :mod:`gradnorm_kernels.functional`."""

from torch import Tensor, nn

from . import functional

__all__ = ["FusedGeLU"]


class FusedGeLU(nn.GELU):
    """:class:`torch.nn.GELU` with fused forward, backward and double backward.

    Also serves as timm's ``act_layer``.

    Args:
        approximate: ``"none"`` (erf) or ``"tanh"``.
        inplace: accepted because timm passes it; the result is always a new tensor, since every
            derivative is computed from the input.

    Shape:
        Any shape; the output has the input's.

    Raises:
        ValueError: if ``approximate`` is neither ``"none"`` nor ``"tanh"``.
    """

    def __init__(self, approximate: str = "none", inplace: bool = False) -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"FusedGeLU: expected approximate to be 'none' or 'tanh', got {approximate!r}")
        super().__init__(approximate)

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)
