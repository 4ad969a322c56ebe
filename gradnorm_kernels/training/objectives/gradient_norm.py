"""The gradient-norm objective of Rodríguez-Muñoz, Wang and Torralba, "Characterizing Model Robustness via
Natural Input Gradients", ECCV 2024, https://arxiv.org/abs/2409.20139.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_non_negative
from ..options import TrainingError, check_options, option
from .common import Batch, Loss, Model, epsilon_option, run
from .engines import ENGINES, NORMS
from .registry import register


@dataclass(frozen=True)
class GradientNormLoss:
    """Cross-entropy plus the norm of its input gradient (Rodríguez-Muñoz et al., arXiv 2409.20139).

    Averaged over the samples i of the batch::

        ce_weight * CE_i + gn_weight * alpha(epoch) * epsilon * norm(d CE_i / d pixels)

    The norm runs over the sample's pixels and channels. To first order, epsilon times the L1 norm is the most
    by which an L-infinity perturbation of size epsilon can raise CE_i; the L2 norm bounds L2 perturbations
    alike. alpha = min(1, epoch / ramp_epochs).

    The gradient is taken of the *summed* cross-entropy, so each sample has its own, whatever the batch size;
    that holds for models whose samples do not interact (BatchNorm in train mode couples them). Where the
    norm's weight is zero no second derivative is computed.

    Parts of its :class:`Loss`: ``cross_entropy`` and ``gradient_norm`` (epsilon times the norm).

    The engines give the same value of the norm, and its gradient with respect to the parameters by

    - ``double_backprop``: differentiating the backward pass. Exact.
    - ``finite_difference``: (CE(x + h d) - CE(x)) / h along d, the derivative of the norm by the input
      gradient (its sign, for L1), held constant; Finlay and Oberman, https://arxiv.org/abs/1905.11468. No
      operation is differentiated twice. The error is of the order of h, plus that of rounding over h, plus
      kinks (ReLU's) that the step crosses; so it wants float32 throughout, and refuses half-precision images,
      parameters, logits and autocast around it, and TF32.
    - ``forward_over_reverse``: the forward-mode derivative of CE along the same d, differentiated backward.
      Exact. PyTorch's own normalisations are wrong there without a word (LayerNorm, BatchNorm in train
      mode), so this engine runs this package's in their place, and refuses models in which it cannot
      (TorchScript, exported graphs). Operations without a forward-mode derivative raise.

    The last two run the model a second time: random layers (dropout, drop path) draw the same numbers,
    buffers begin as in the first pass, and BatchNorm's running statistics count the batch once.

    Args:
        ce_weight, gn_weight, epsilon: at least 0; epsilon in pixel units (pixels lie in [0, 1]).
        ramp_epochs: epochs over which alpha rises linearly from 0 to 1; 0 for alpha = 1 throughout.
        norm: ``"l1"``, ``"l2"`` or ``"squared_l2"``.
        engine: one of the three above.
        difference_step: h of ``finite_difference``, in pixel units: the root mean square of the step.

    Raises:
        ValueError: if an argument is negative, not finite or unknown.
    """

    ce_weight: float = option(0.8, "weight of the cross-entropy beside a gradient norm (else 1)", minimum=0)
    gn_weight: float = option(1.2, "weight of the gradient norm", minimum=0)
    epsilon: float = epsilon_option()
    ramp_epochs: float = option(5.0, "epochs over which the gradient norm's weight rises from 0", minimum=0)
    norm: str = option("l1", "norm of the input gradient", choices=tuple(NORMS))
    engine: str = option(
        "double_backprop", "how the gradient norm is differentiated; double_backprop and forward_over_reverse"
        " are exact",
        choices=tuple(ENGINES),
    )  # fmt: skip
    difference_step: float = option(1e-4, above=0)

    def __post_init__(self) -> None:
        check_options(self)

    def alpha(self, epoch: float) -> float:
        """The ramp at ``epoch`` (epochs since the start of training, fractions count), from 0 to 1."""
        check_non_negative(epoch=epoch)
        return min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs else 1.0

    def schedule(self, epoch: float) -> dict[str, float]:
        """``alpha``."""
        return {"alpha": self.alpha(epoch)}

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss:
        """Computes the loss with a graph that ``total.backward()`` differentiates a second time.

        Args:
            model: maps images to logits (B, C). Normalisation of the pixels belongs inside it
                (:class:`~gradnorm_kernels.training.models.Normalize`): the norm is that of the gradient with
                respect to what is passed here.
            images: (B, ...) with B at least 1, floating point, pixels in [0, 1]. No gradient flows back to
                it.
            targets: (B,) int64 class indices, or (B, C) floating-point class probabilities.
            epoch: epochs since the start of training, fractions count.

        Raises:
            TypeError: if ``images`` or ``targets`` has an unsuitable dtype, or is no tensor.
            ValueError: if a shape, device or value does not fit.
            RuntimeError: if gradients are disabled (``torch.no_grad``), or the engine cannot be right.
        """
        batch = self.run(model, images, targets, epoch)
        total, parts = self.terms(batch, epoch)
        return Loss(total, parts, batch.logits.detach())

    def run(
        self, model: Model, images: Tensor, targets: Tensor, epoch: float, *, input_gradient: bool = False
    ) -> Batch:
        """The forward pass that :meth:`terms` needs at ``epoch``, with an input gradient if asked for."""
        wants_norm = self._weight(epoch) > 0
        return run(
            model,
            images,
            targets,
            input_gradient=input_gradient or wants_norm,
            replayable=wants_norm and self.engine != "double_backprop",
        )

    def terms(self, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that :meth:`run` ran, and its parts."""
        parts = {"cross_entropy": batch.cross_entropy.detach().mean()}
        if not self._weight(epoch):
            return self.ce_weight * batch.cross_entropy.mean(), parts
        norms = self.norms(batch)
        parts["gradient_norm"] = self.epsilon * norms.detach().mean()
        return self.total(batch.cross_entropy, norms, epoch), parts

    def norms(self, batch: Batch) -> Tensor:
        """The norms (B,) of the input gradients, differentiable by the engine."""
        return ENGINES[self.engine](batch, NORMS[self.norm], self.difference_step)

    def total(self, cross_entropy: Tensor, norms: Tensor, epoch: float) -> Tensor:
        """The loss of samples of these cross-entropies (B,) and norms (B,)."""
        share = 1 / len(norms)  # before the sum, because a mean is a launch more, forward and backward
        weight = share * self._weight(epoch) * self.epsilon
        return torch.add(share * self.ce_weight * cross_entropy, norms, alpha=weight).sum()

    def _weight(self, epoch: float) -> float:
        return self.gn_weight * self.alpha(epoch)


def _check_run(config: Any) -> None:
    if config.engine != "double_backprop" and config.compile:
        raise TrainingError(f"compile: {config.engine} runs the model twice, which cannot be compiled")
    if config.engine == "finite_difference" and config.precision != "float32":
        raise TrainingError(f"engine: finite_difference needs float32, not {config.precision}")


register("gradient_norm", GradientNormLoss, "with the norm of its input gradient", check=_check_run)
