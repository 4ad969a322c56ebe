"""The switch that gives PyTorch's own ops fused double backwards."""

from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_fused_double_backward_enabled() -> bool:
    """Whether PyTorch's own ops use fused double backwards now."""
    return torch.ops.gradnorm_kernels.is_fused_double_backward_enabled()


class set_fused_double_backward(ContextDecorator):  # noqa: N801 - the idiom of torch.set_grad_enabled
    """Replaces the double-backward formulas of PyTorch's own ops with fused ones, or restores them.

    Code that is not touched at all (a WGAN-GP, a PINN, a force field, ``torch.nn.GELU``) then differentiates
    twice at fused speed. Only the double backward changes: forward and first backward stay PyTorch's.
    Covered, in place too: the activations (GELU, SiLU, Mish, Softplus, ELU and its kin, tanh, sigmoid,
    log-sigmoid, hard sigmoid, hard swish, GLU, ReLU, ReLU6, leaky ReLU, PReLU, sine and cosine; not softsign,
    which PyTorch makes of several ops), the losses smooth L1, Huber and soft margin, ``logsumexp``, layer,
    batch, group and instance normalisation, softmax and its logarithm, the Euclidean norm (in ``F.normalize``
    and ``F.pairwise_distance`` too), weight normalisation, ``cdist`` with ``p`` of 1 and 2 (on CUDA its first
    backward, too), every convolution, grid sampling that is not bicubic, and scaled dot-product attention,
    whose fused kernels PyTorch cannot differentiate twice; LSTM and GRU networks, but for packed sequences,
    projections and autocast. RMS normalisation, cosine similarity, cross-entropy, GRUs and LSTMs that are not
    oneDNN's are fused from the forward on, as is the first backward of ``logsumexp``, sine, cosine and
    grouped-query attention. What PyTorch gets wrong, or NaN, is right: weight normalisation, which it
    differentiates with the norm held constant; the norm, and so ``F.normalize`` and cosine similarity, of
    rows of zeros; sinc at 0; the third order of transposed convolutions with output padding. So is what it
    cannot differentiate twice: embedding bags, but for sparse gradients, ``F.ctc_loss``,
    ``F.multi_margin_loss``, ``F.multilabel_margin_loss`` and ``torch.segment_reduce``.

    Under ``torch.func`` transforms, forward-mode AD and in graphs that are captured for a compiler, layer,
    batch and instance normalisation, softmax, its logarithm, attention, grid sampling, ``cdist``, weight
    normalisation, Mish and hard sigmoid are plain ops, which are right to every order where PyTorch's own
    formulas are wrong or missing; the rest is PyTorch's own. So are nested tensors and tensor subclasses. In
    forward mode (``torch.func.jvp``, dual numbers) attention's tangent is one op, which its fused backward
    and double backward differentiate.

    Works as ``torch.set_grad_enabled`` does: calling it sets the mode at once, ``with`` restores the
    previous one at the end, and it decorates functions. Unlike it, the mode belongs to the whole process,
    since backward passes have threads of their own. It holds for the graphs recorded while it is on: what
    counts is the mode when the *first* backward runs with ``create_graph=True``. It may be set while other
    threads run PyTorch.

    Args:
        mode: ``True`` to use fused double backwards, ``False`` to use PyTorch's own.

    Raises:
        TypeError: if ``mode`` is not a bool.

    >>> with gk.set_fused_double_backward(True):
    ...     (grad,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
    ...     grad.abs().sum().backward()
    """

    def __init__(self, mode: bool) -> None:
        if not isinstance(mode, bool):
            raise TypeError(f"set_fused_double_backward: expected mode to be a bool, got {mode!r}")
        self.mode = mode
        self.previous = is_fused_double_backward_enabled()
        _set(mode)

    def __call__(self, func: _Function) -> _Function:
        _set(self.previous)
        return super().__call__(func)

    def _recreate_cm(self) -> "set_fused_double_backward":
        """For ContextDecorator: each call of a decorated function restores what it found."""
        return type(self)(self.mode)

    def __enter__(self) -> None:
        _set(self.mode)

    def __exit__(self, *exc_info: object) -> None:
        _set(self.previous)


def _set(mode: bool) -> None:
    torch.ops.gradnorm_kernels.set_fused_double_backward(mode)


# What torch.compiler.disable sets, without importing Dynamo: a compiled function that switches would do so
# only while it is traced.
set_fused_double_backward.__init__._torchdynamo_disable = True  # type: ignore[attr-defined]
_set._torchdynamo_disable = True  # type: ignore[attr-defined]
