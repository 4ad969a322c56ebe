"""Accuracy under attack: AutoAttack, APGD, PGD and FGSM, image by image, resumable.

AutoAttack is the standard version of Croce and Hein, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks", ICML 2020, https://arxiv.org/abs/2003.01690, as pyautoattack
implements it.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack, checks
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn
from tqdm import tqdm

from .attacks import ATTACKS, NORMS, cross_entropy_gradient, perturb
from .checks import check_choice, check_count, check_images, check_logits, check_non_negative, check_pixels
from .files import write_text
from .objectives.common import evaluated

__all__ = ["ATTACKS", "Robustness", "evaluate", "robustness_curve"]

_STEPS = {"apgd-ce": 100, "pgd": 20}  # 100 as in AutoAttack
# Of the images that could be attacked; fewer may be chance, such as those that a network maps to a constant.
_MASKED = 0.01

_OWN = ("pgd", "fgsm")
FEW_CLASSES = (
    "autoattack needs at least 4 classes, got {}: its targeted DLR loss is undefined for fewer; apgd-ce or"
    " pgd will do"
)

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Settings:
    """What a result depends on, apart from the model and the data."""

    attack: str
    norm: str
    eps: float
    seed: int
    steps: int | None
    batch_size: int

    def __post_init__(self) -> None:
        check_choice("attack", self.attack, ATTACKS)
        check_choice("norm", self.norm, NORMS)
        check_non_negative(eps=self.eps)
        if not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        check_count(batch_size=self.batch_size)
        if self.steps is not None:
            if self.attack not in _STEPS:
                raise ValueError(f"steps: {self.attack} has none to choose; {' and '.join(_STEPS)} have")
            check_count(steps=self.steps)


@dataclass(frozen=True, eq=False)
class Robustness(_Settings):
    """Which images a model classifies correctly, as they are and under attack. Accuracies are shares of 1.

    Attributes:
        attack: what :func:`evaluate` was asked for, as are ``norm``, ``eps``, ``seed`` and ``batch_size``.
        steps: of "pgd" and "apgd-ce"; ``None`` for the others.
        accuracies: from each attack of the ensemble, in order, to the accuracy that it and those before it
            left; empty where ``eps`` is 0.
        clean_correct: (N,) bool, on the CPU: classified correctly without attack.
        robust: (N,) bool, on the CPU: also under all attacks.
        zero_gradient: (N,) bool, on the CPU: classified correctly, but the cross-entropy's gradient by the
            pixels, which the attacks but Square follow, is exactly zero (gradient masking: Athalye et al.,
            https://arxiv.org/abs/1802.00420). All False where ``eps`` is 0.
        unmoved: the attacks that changed no image, as the model sees them.
        seconds: of computation, over all the runs that a resumed evaluation took.
    """

    accuracies: dict[str, float]
    clean_correct: Tensor = field(repr=False)
    robust: Tensor = field(repr=False)
    zero_gradient: Tensor = field(repr=False)
    unmoved: list[str]
    seconds: float

    @property
    def gradient_masking(self) -> float:
        """The share of the correctly classified images whose gradient is exactly zero."""
        return int(self.zero_gradient.sum()) / max(int(self.clean_correct.sum()), 1)

    @property
    def is_doubtful(self) -> bool:
        """Whether the attacks had nothing to follow, or moved nothing: then more images may be fooled."""
        return self.gradient_masking >= _MASKED or bool(self.unmoved)

    @property
    def images(self) -> int:
        """N, the number of images."""
        return len(self.robust)

    @property
    def clean_accuracy(self) -> float:
        return _share(self.clean_correct)

    @property
    def robust_accuracy(self) -> float:
        return _share(self.robust)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON: the masks as lists of bool."""
        return {
            **{item.name: getattr(self, item.name) for item in fields(_Settings)},
            "images": self.images,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "accuracies": dict(self.accuracies),
            "gradient_masking": self.gradient_masking,
            "is_doubtful": self.is_doubtful,
            "unmoved": list(self.unmoved),
            "clean_correct": self.clean_correct.tolist(),
            "robust": self.robust.tolist(),
            "zero_gradient": self.zero_gradient.tolist(),
            "seconds": self.seconds,
        }


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: str = "autoattack",
    eps: float = 4 / 255,
    norm: str = "Linf",
    batch_size: int = 250,
    seed: int = 0,
    device: str | torch.device | None = None,
    steps: int | None = None,
    state_path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Robustness:
    """Finds which of ``images`` the model classifies correctly, and still does under ``attack``.

    The attacks, each on the images that the ones before left:

    - "autoattack": APGD-CE, targeted APGD-DLR, targeted FAB and Square, with AutoAttack's standard numbers;
      the targeted ones try the 9 likeliest wrong classes, or all where there are fewer. The mask is that of
      ``AutoAttack(model, ...).run_standard_evaluation`` with the same seed and batch size.
    - "apgd-ce": APGD on the cross-entropy with one start, by default 100 iterations.
    - "pgd": a random start and, by default, 20 steps of 2.5 * eps / steps (:func:`.attacks.perturb`).
    - "fgsm": one step of eps from the image itself.

    The model is in eval mode meanwhile and its parameters do not require gradients; both are as before
    afterwards, as are ``.grad`` and torch's random numbers. It is given pixels in its parameters' dtype; the
    attacks move them in float32. Results depend on ``seed`` and ``batch_size``; on a CPU they repeat to the
    bit, if the model is deterministic.

    Warns:
        UserWarning: what AutoAttack has to say of the model, once each: that it is random, returns
            probabilities, computes gradients in its forward, has zero gradients, or that Square fooled it
            where the gradients did not; and of any attack, that gradients are exactly zero for 1% or more of
            the images (:attr:`Robustness.gradient_masking`), or that it changed no image. All make the result
            doubtful: the robust accuracy is an upper bound.

    Args:
        model: from pixels in [0, 1], (B, C, H, W), to logits (B, K); normalisation belongs inside it.
        images: (N, C, H, W), floating point, in [0, 1], on any device.
        labels: (N,) int64, from 0 to K - 1.
        attack: one of ``ATTACKS``.
        eps: largest perturbation, in pixel units; at 0 no attack runs.
        norm: "Linf" or "L2".
        batch_size: images attacked at once.
        seed: of the attacks' random numbers; the same for each batch.
        device: where the model is; by default, where its parameters are. Batches are moved there.
        steps: of "pgd" and "apgd-ce" alone.
        state_path: a JSON file, written after each batch, from which the same call goes on after an
            interruption with the result of an uninterrupted run. Complete, it answers at once.
        progress: draw a bar for each attack on stderr.

    Raises:
        TypeError: if ``model`` is no module, or ``images`` or ``labels`` is no tensor of a suitable dtype.
        ValueError: if another argument, a shape or a value does not fit; if ``state_path`` holds another
            evaluation, or is no such file; if logits are NaN or infinite; if AutoAttack is to attack fewer
            than 4 classes, for which its targeted DLR loss is undefined
            (https://github.com/fra31/auto-attack/issues/70).
    """
    steps = _STEPS.get(attack) if steps is None else steps
    settings = _Settings(attack, norm, float(eps), seed, steps, batch_size)
    _check_data(model, images, labels)
    target = _Target(model, images, labels, _device(model, images, device), batch_size)
    with _under_attack(model, target.device):
        file = _StateFile(state_path, settings, target)
        warner = _Warner()
        state = file.read()
        if state is None:
            state = _clean_pass(target, settings)
            if attack == "autoattack" and eps:
                _check_model(target, warner)
            file.write(state)
        for name, run in _attacks(target, settings, state.classes, warner).items():
            if name not in state.accuracies:
                _run(name, run, target, state, file, progress)
        checks.check_square_sr({"clean": _share(state.clean_correct), **state.accuracies}, logger=warner)
    measured = {item.name for item in fields(Robustness)} - {item.name for item in fields(_Settings)}
    result = Robustness(**asdict(settings), **{name: getattr(state, name) for name in measured})
    _warn(result)
    return result


def robustness_curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    attack: str = "autoattack",
    norm: str = "Linf",
    state_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[Robustness]:
    """:func:`evaluate` at each of ``eps``, in order. Takes, warns and raises what it does, save that:

    Args:
        eps: largest perturbations, in pixel units; 0 stands for no attack.
        state_dir: directory, made if absent, for a state file of each; other calls with the same attack, norm
            and eps need another one.
    """
    # Before the first attack has run for hours.
    for value in eps:
        check_non_negative(eps=value)
    options |= {"attack": attack, "norm": norm}
    return [
        evaluate(
            model,
            images,
            labels,
            eps=value,
            state_path=None if state_dir is None else Path(state_dir) / f"{attack}-{norm}-{value!r}.json",
            **options,
        )
        for value in map(float, eps)
    ]


class _Target:
    """The model under attack and its images, in batches on its device."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, device: torch.device, batch_size: int
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.device, self.batch_size = device, batch_size
        tensors = itertools.chain(model.parameters(), model.buffers())
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, K) float32, in which the attacks calculate."""
        logits = self.model(pixels.to(self.dtype))
        check_logits(logits, pixels)
        return logits.float()

    def finite_logits(self, pixels: Tensor, which: str) -> Tensor:
        """The logits, or an error in which ``which`` names the images."""
        logits = self.logits(pixels)
        # The class of NaN is none in particular, so that they would count as fooled; of infinite ones the
        # gradient is NaN, so that none could be.
        if not logits.isfinite().all():
            raise ValueError(f"model: logits of {which} are NaN or infinite")
        return logits

    def batches(self, indices: Tensor, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices, images and labels, from batch ``start`` on of those that ``indices`` make up."""
        for part in indices.split(self.batch_size)[start:] if len(indices) else ():
            # Attacks view images as rows, which those stored channels-last do not allow.
            x = self.images[part].detach().to(self.device, torch.float32).contiguous()
            yield part, x, self.labels[part].to(self.device)


@dataclass
class _State:
    """How far an evaluation has come: the attacks in ``accuracies`` and ``batches`` of the next one.

    Attributes:
        classes: K.
        clean_correct: (N,) bool.
        robust: (N,) bool: not fooled so far.
        pending: (N,) bool: ``robust`` when the current attack began, which determines its batches.
        zero_gradient, unmoved: those of :class:`Robustness`; ``moved`` is whether the current attack has
            changed an image.
    """

    classes: int
    clean_correct: Tensor
    robust: Tensor
    pending: Tensor
    zero_gradient: Tensor
    unmoved: list[str] = field(default_factory=list)
    moved: bool = False
    batches: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


_MASKS = ("clean_correct", "robust", "pending", "zero_gradient")


class _StateFile:
    """A state on disk with what it is the state of; without a path, nothing."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: _Settings, target: _Target) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            weights = {k: v for k, v in target.model.state_dict().items() if isinstance(v, Tensor)}
            self.identity = {
                **asdict(settings),
                "images": len(target.images),
                "data_sha256": _digest({"images": target.images, "labels": target.labels}),
                "model_sha256": _digest(weights),
            }

    def read(self) -> _State | None:
        """The state; ``None`` if there is no file.

        Raises:
            ValueError: if the file is the state of another evaluation, or no state.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            identity = dict(content.pop("evaluation"))
            for name in _MASKS:
                content[name] = torch.tensor([flag == "1" for flag in content[name]], dtype=torch.bool)
            state = _State(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state_path: {self.path} is not the state of an evaluation") from error
        if identity != self.identity:
            differ = [name for name, value in self.identity.items() if identity.get(name) != value]
            how = "; ".join(f"{k} is {identity.get(k)} there and {self.identity[k]} here" for k in differ)
            raise ValueError(f"state_path: {self.path} holds another evaluation: {how}")
        return state

    def write(self, state: _State) -> None:
        """Replaces the file whole or not at all."""
        if self.path is None:
            return
        masks = {name: "".join("01"[flag] for flag in getattr(state, name).tolist()) for name in _MASKS}
        content = {"evaluation": self.identity, **vars(state), **masks}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(content))


def _clean_pass(target: _Target, settings: _Settings) -> _State:
    """The state before the first attack.

    Raises:
        ValueError: if the logits, or the number of classes, do not suit the labels or the attack.
    """
    start = time.perf_counter()
    correct, zero = (torch.zeros(len(target.images), dtype=torch.bool) for _ in range(2))
    classes = 0
    for indices, x, y in target.batches(torch.arange(len(correct))):
        with torch.set_grad_enabled(settings.eps > 0):
            logits = target.finite_logits(x.requires_grad_(settings.eps > 0), "the images")
        predicted, classes = logits.max(dim=1)[1], logits.shape[1]
        if y.max() >= classes:
            raise ValueError(f"labels: expected class indices from 0 to {classes - 1}, got {int(y.max())}")
        if settings.attack == "autoattack" and settings.eps and classes < 4:
            raise ValueError(f"attack: {FEW_CLASSES.format(classes)}")
        correct[indices] = (predicted == y).cpu()
        if settings.eps:
            gradient = cross_entropy_gradient(logits, x, y).flatten(1)
            zero[indices] = ((gradient == 0).all(1) & (predicted == y)).cpu()
    seconds = time.perf_counter() - start
    return _State(classes, correct, correct.clone(), correct.clone(), zero, seconds=seconds)


def _run(name: str, attack: Attack, target: _Target, state: _State, file: _StateFile, progress: bool) -> None:
    """Runs what is left of an attack, and brings ``state`` and ``file`` up to date after each batch."""
    if not state.batches:
        state.pending, state.moved = state.robust.clone(), False
    indices = state.pending.nonzero().flatten()
    done = min(state.batches * target.batch_size, len(indices))
    with tqdm(total=len(indices), initial=done, desc=name, unit="image", disable=not progress) as bar:
        start = time.perf_counter()
        for part, x, y in target.batches(indices, state.batches):
            attacked = attack(x, y)
            predicted = target.finite_logits(attacked, f"the images that {name} made").max(dim=1)[1]
            state.robust[part[(predicted != y).cpu()]] = False
            state.moved |= not torch.equal(attacked.to(target.dtype), x.to(target.dtype))
            state.batches += 1
            now = time.perf_counter()
            state.seconds, start = state.seconds + now - start, now
            file.write(state)
            bar.set_postfix_str(f"robust accuracy {_share(state.robust):.2%}", refresh=False)
            bar.update(len(part))
    state.accuracies[name] = _share(state.robust)
    # The others return what does not fool the model as it was.
    if name in _OWN and len(indices) and not state.moved:
        state.unmoved.append(name)
    state.batches = 0
    file.write(state)


def _attacks(target: _Target, settings: _Settings, classes: int, warner: "_Warner") -> dict[str, Attack]:
    """From images (B, C, H, W) and labels (B,) to images at most eps away, by name and in order."""
    eps, norm, seed = settings.eps, settings.norm, settings.seed
    options = {"eps": eps, "norm": norm, "seed": seed, "device": target.device}
    if not eps:
        return {}
    if settings.attack == "autoattack":
        # Attack by attack, because AutoAttack's own loop cannot resume: its state file is never accepted.
        ensemble = AutoAttack(target.logits, version="standard", **options)
        ensemble.apgd.logger = ensemble.apgd_targeted.logger = warner
        ensemble.fab.targeted = True
        # With more targets than wrong classes it only warns, and then indexes past the classes.
        targets = min(ensemble.fab.n_target_classes, classes - 1)
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = targets
        return {
            "apgd-ce": ensemble.apgd.perturb,
            "apgd-t": ensemble.apgd_targeted.perturb,
            "fab-t": ensemble.fab.perturb,
            "square": ensemble.square.perturb,
        }
    if settings.attack == "apgd-ce":
        apgd = APGDAttack(target.logits, n_iter=settings.steps, n_restarts=1, loss="ce", **options)
        return {"apgd-ce": apgd.perturb}

    def descend(x: Tensor, y: Tensor) -> Tensor:
        start: dict[str, Any] = {"random_start": False, "steps": 1, "step_size": eps}
        if settings.steps:
            start = {"random_start": True, "steps": settings.steps, "step_size": 2.5 * eps / settings.steps}
        generator = torch.Generator().manual_seed(seed)
        return perturb(target.logits, x, y, eps=eps, norm=norm, generator=generator, **start)

    return {settings.attack: descend}


def _warn(result: Robustness) -> None:
    bound = f"{result.attack} at eps {result.eps:g} gives an upper bound of the robust accuracy"
    remedy = "Square, the last attack of autoattack, follows no gradient"
    if result.gradient_masking >= _MASKED:
        share = f"{result.gradient_masking:.1%} of the images that the model classifies correctly"
        why = f"gradient masking: the cross-entropy's gradient is exactly zero for {share}"
        warnings.warn(f"{why}, so that {bound}; {remedy}", stacklevel=3)
    for name in result.unmoved:
        warnings.warn(f"{name} changed no image that the model sees, so that {bound}; {remedy}", stacklevel=3)


class _Warner:
    """Takes the place of pyautoattack's logger: Python warnings instead, one of each kind."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def warning(self, message: str) -> None:
        # The zero gradients of every batch and class differ in their number.
        kind = re.sub(r"[\d.]+", "", message)
        if kind not in self.seen:
            self.seen.add(kind)
            advice = "https://github.com/fra31/auto-attack/blob/master/flags_doc.md"
            warnings.warn(f"AutoAttack: {message.replace('flags_doc.md', advice)}", stacklevel=2)


def _check_model(target: _Target, warner: _Warner) -> None:
    """AutoAttack's checks of the first batch: that the model is an ordinary one."""
    _, x, y = next(target.batches(torch.arange(len(target.images))))
    checks.check_randomized(target.logits, x, y, bs=len(x), logger=warner)
    checks.check_range_output(target.logits, x, logger=warner)
    # It counts calls by tracing, in a table that it never clears, and drops a debugger's or coverage's trace.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    trace = sys.gettrace()
    try:
        checks.check_dynamic(target.logits, x, logger=warner)
    finally:
        sys.settrace(trace)


@contextmanager
def _under_attack(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts the model in eval mode without parameters that require gradients, and all back afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The attacks seed torch's default generators.
    devices = [device] if device.type == "cuda" else []
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluated(model), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _device(model: nn.Module, images: Tensor, device: str | torch.device | None) -> torch.device:
    if device is None:
        return next(itertools.chain(model.parameters(), model.buffers()), images).device
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {error}") from error


def _check_data(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_images(images, planes=True)
    check_pixels(images)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an int64 tensor, got {kind}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(images)},), got {tuple(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"labels: expected class indices of at least 0, got {int(labels.min())}")


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / len(mask)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
