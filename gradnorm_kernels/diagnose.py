"""What will raise, be wrong or be slow when a first gradient is differentiated, read from its graph."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .switch import is_fused_double_backward_enabled

__all__ = ["Diagnosis", "Finding", "diagnose"]

Node = Any  # of an autograd graph

SWITCH = "gk.set_fused_double_backward(True)"
FUSE = f"gk.fuse(model), or {SWITCH}"

# Of the nodes that PyTorch records in the forward, without "Backward0": what their double backward moves, in
# tensors of the output's size, the least that it could, and what covers them. Counted on meta tensors, of a
# common case where it depends on that.
_TRAFFIC: dict[str, tuple[float, float, str | None]] = {
    "Cos": (13, 5, SWITCH),
    "CudnnBatchNorm": (84, 5, FUSE),
    "Elu": (18, 5, FUSE),
    "FusedRmsNorm": (50, 5, FUSE),
    "Gelu": (26, 5, FUSE),
    "Glu": (32, 4, FUSE),
    "Hardswish": (18, 5, FUSE),
    "Hardtanh": (5, 3, FUSE),
    "LeakyRelu": (5, 3, FUSE),
    "Mish": (52, 5, FUSE),
    "NativeBatchNorm": (84, 5, FUSE),
    "NativeGroupNorm": (49, 5, FUSE),
    "NativeLayerNorm": (82, 5, FUSE),
    "Relu": (8, 3, FUSE),
    "Sigmoid": (16, 5, FUSE),
    "Silu": (29, 5, FUSE),
    "Sin": (13, 5, SWITCH),
    "Softmax": (27, 5, FUSE),
    "Softplus": (22, 5, FUSE),
    "Tanh": (14, 5, FUSE),
    "BinaryCrossEntropy": (64, 4, None),
    "Cdist": (79, 4, SWITCH),
    "Cumprod": (4534, 5, None),
    "EuclideanDist": (57, 4, SWITCH),
    "GridSampler2D": (103, 5, SWITCH),
    "GridSampler3D": (294, 5, SWITCH),
    "LinalgVectorNorm": (29, 3, SWITCH),
    "LogSigmoid": (17, 5, FUSE),
    "LogSoftmax": (19, 5, FUSE),
    "Logsumexp": (21, 3, None),
    "MkldnnRnnLayer": (98, 10, SWITCH),
    "PdistForward": (911, 19, None),
    "WeightNormInterface": (26, 5, FUSE),
}
# Those whose second derivative PyTorch computes wrongly, without an error.
_WRONG = {
    "WeightNormInterface": (
        "takes the weight's norm for a constant",
        f"{FUSE}; only that for torch.nn.utils.weight_norm",
    ),
}
# Whose backward has a derivative that does nothing but raise.
_WITHOUT_DERIVATIVE = {"CudnnRnn", "EmbeddingBag"}
_REMEDIES = {
    "CompiledFunction": "compile the whole step, or differentiate the module as it was before torch.compile",
    "CtcLoss": SWITCH,
    "CudnnRnn": f"{SWITCH} for LSTMs and GRUs, or torch.backends.cudnn.flags(enabled=False)",
    "EmbeddingBag": f"{SWITCH} unless sparse=True",
    "Hardsigmoid": FUSE,
    "MultiMarginLoss": SWITCH,
    "MultilabelMarginLoss": SWITCH,
    "NativeBatchNorm": FUSE,
    "NativeLayerNorm": FUSE,
    "ScaledDotProduct": FUSE,
    "SegmentReduce": SWITCH,
}
_KINDS = ("raises", "wrong", "cut", "slow")


@dataclass(frozen=True)
class Finding:
    """One kind of node of a graph, and what differentiating its backward comes to.

    Attributes:
        kind: ``"raises"``; ``"wrong"``, silently; ``"cut"``: the gradient has no graph there, which
            ``torch.autograd.grad`` leaves out without a word; or ``"slow"``.
        op: the node, as autograd names it.
        count: how many of them.
        modules: qualified names of the modules that made them, or lines of code where the outputs were
            computed under ``torch.autograd.detect_anomaly``; empty where neither is known.
        why: what happens.
        remedy: what to do about it, or ``""``.
        excess_bytes: of a slow one, what its double backward moves beyond the least, in bytes: an estimate.
    """

    kind: str
    op: str
    count: int
    modules: tuple[str, ...]
    why: str
    remedy: str
    excess_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return asdict(self)


class Diagnosis(list[Finding]):
    """Findings, the worst first; as text, a table."""

    @property
    def harmful(self) -> Diagnosis:
        """Those that make a result wrong or missing."""
        return Diagnosis(finding for finding in self if finding.kind != "slow")

    def __str__(self) -> str:
        if not self:
            return "nothing found: the gradient can be differentiated"
        return "\n".join(_lines(finding) for finding in self)


def diagnose(
    outputs: Tensor | Sequence[Tensor] | Callable[..., Any], inputs: Tensor | Sequence[Tensor]
) -> Diagnosis:
    """Finds out what differentiating the gradient of ``outputs`` by ``inputs`` a second time comes to.

    Takes the gradient with ``create_graph=True`` and looks at what each node's backward recorded. No second
    derivative is computed. What is not on a path from ``inputs`` to ``outputs`` is not looked at: give the
    parameters, too, where the penalised gradient is theirs. It is PyTorch's second order alone that is
    judged, of the versions that this package supports.

    Args:
        outputs: computed from ``inputs``; or a module or function, which is called with detached copies of
            them. Only then are modules known by name. Anything nested that holds tensors will do.
        inputs: floating-point tensors; of computed ``outputs``, those that require a gradient.

    Raises:
        TypeError: if ``inputs`` are no floating-point tensors, or ``outputs`` holds no tensor.
        ValueError: if ``outputs`` do not depend on ``inputs``.

    >>> print(gk.diagnose(model, images))
    """
    variables = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    for variable in variables:
        if not isinstance(variable, Tensor) or not variable.is_floating_point():
            kind = variable.dtype if isinstance(variable, Tensor) else type(variable).__name__
            raise TypeError(f"diagnose: expected inputs to be floating-point tensors, got {kind}")
    with torch.enable_grad():
        spans: list[_Span] = []
        if callable(outputs) and not isinstance(outputs, Tensor):
            variables = [variable.detach().clone().requires_grad_() for variable in variables]
            with _modules_noted(outputs, spans):
                outputs = outputs(*variables)
        leaves = torch.utils._pytree.tree_leaves(outputs)
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        if not tensors:
            raise TypeError("diagnose: expected outputs to hold a floating-point tensor")
        tensors = [t for t in tensors if t.grad_fn is not None]
        steps = _backward(tensors, variables)
    return _summary(steps, spans)


@dataclass(frozen=True)
class _Step:
    """One node of the forward's graph, and what its backward was given and returned."""

    node: Node
    grad_outputs: list[Tensor]
    grad_inputs: list[Tensor]
    operands: list[bool]  # whether it returned a gradient of each

    @property
    def op(self) -> str:
        return self.node.name().split("::")[-1]

    @property
    def base(self) -> str:
        return re.sub(r"Backward\d*$", "", self.op)

    def recorded(self) -> list[str]:
        """The nodes that its backward recorded, of which a view's may be that of what it was given."""
        given = {g.grad_fn for g in self.grad_outputs}
        return [
            g.grad_fn.name() for g in self.grad_inputs if g.grad_fn is not None and g.grad_fn not in given
        ]


def _backward(outputs: list[Tensor], inputs: list[Tensor]) -> list[_Step]:
    """Every node that the first gradient runs, in the order of the backward."""
    steps: list[_Step] = []

    def note(node: Node) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: Any, grad_outputs: Any) -> None:
            given, returned = ([g for g in some if g is not None] for some in (grad_outputs, grad_inputs))
            steps.append(_Step(node, given, returned, [g is not None for g in grad_inputs]))

        return hook

    handles = [
        node.register_hook(note(node)) for node in graph_nodes(outputs) if not hasattr(node, "variable")
    ]
    # Gradients come in from what was differentiated before, in general.
    incoming = [torch.ones_like(output).requires_grad_() for output in outputs]
    try:
        gradients = torch.autograd.grad(outputs, inputs, incoming, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        gradients = ()
    finally:
        for handle in handles:
            handle.remove()
    if not outputs or all(gradient is None for gradient in gradients):
        raise ValueError(
            "diagnose: expected outputs that depend on inputs, and inputs that require a gradient"
        )
    return steps


def graph_nodes(outputs: Sequence[Tensor]) -> set[Node]:
    """All nodes of the graphs that ``outputs`` were computed by."""
    seen: set[Node] = set()
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return seen


def _summary(steps: list[_Step], spans: list[_Span]) -> Diagnosis:
    grouped: dict[tuple[str, ...], list[_Step]] = defaultdict(list)
    for step in reversed(steps):
        for verdict in _verdicts(step):
            grouped[(step.op, *verdict)].append(step)
    findings = Diagnosis()
    for (op, kind, why, remedy), group in grouped.items():
        places = dict.fromkeys(filter(None, (_place(step.node, spans) for step in group)))
        excess = sum(_excess(step) for step in group) if kind == "slow" else 0
        findings.append(Finding(kind, op, len(group), tuple(places), why, remedy, excess))
    return Diagnosis(sorted(findings, key=lambda f: (_KINDS.index(f.kind), -f.excess_bytes, f.op)))


def _verdicts(step: _Step) -> Iterator[tuple[str, str, str]]:
    """Of each the kind, why, and the remedy."""
    recorded, base = step.recorded(), step.base
    is_ours = any("gradnorm_kernels" in name for name in recorded)
    remedy = next((text for name, text in _REMEDIES.items() if base.startswith(name)), "")
    if (base in _WITHOUT_DERIVATIVE and not is_ours) or any(
        name.endswith("NotImplemented") for name in recorded
    ):
        yield "raises", "PyTorch has no derivative of its backward", remedy
    elif any("CompiledFunctionBackwardBackward" in name for name in recorded):
        yield "raises", "torch.compile does not support double backward", remedy
    elif any(name.endswith("Error") for name in recorded):
        why = (
            "its backward is marked once_differentiable: backward() raises, torch.autograd.grad leaves it out"
        )
        yield "cut", why, "a backward of differentiable operations, without the mark"
    elif _is_cut(step):
        yield (
            "cut",
            "its backward returns a gradient without a graph",
            "a backward of differentiable operations",
        )
    elif is_ours:
        return
    elif base in ("NativeLayerNorm", "NativeBatchNorm") and _has_bias_alone(step):
        yield "raises", "PyTorch expects a weight where the gradient of a bias is differentiated", remedy
    elif base in _WRONG and not is_fused_double_backward_enabled():
        why, remedy = _WRONG[base]
        yield "wrong", why, remedy
    if base in _TRAFFIC and not is_ours:
        moved, least, covered = _TRAFFIC[base]
        why = f"its double backward moves {moved:g} tensors of its size, where {least:g} would do"
        yield "slow", why, covered or ""
    elif base == "Convolution" and _is_grouped(step.node):
        yield "slow", "its double backward is a convolution for every group", FUSE


def _is_cut(step: _Step) -> bool:
    given = any(g.requires_grad for g in step.grad_outputs)
    return given and any(g.is_floating_point() and not g.requires_grad for g in step.grad_inputs)


def _has_bias_alone(step: _Step) -> bool:
    return step.node._saved_weight is None and step.operands[2]


def _is_grouped(node: Node) -> bool:
    return node._saved_groups > 1


def _excess(step: _Step) -> int:
    moved, least, _ = _TRAFFIC.get(step.base, (0, 0, None))
    size = max((g.numel() * g.element_size() for g in step.grad_outputs), default=0)
    return round((moved - least) * size)


# Sequence numbers from the first to the last of the nodes that a module made, and its name.
_Span = tuple[int, int, str]


@contextmanager
def _modules_noted(function: Any, spans: list[_Span]) -> Iterator[None]:
    """Puts into ``spans`` each call of a module, inner ones before those around them."""
    names = {module: name or "the model" for name, module in _named_modules(function)}
    # A hook inside would keep it from being compiled.
    for compiled in [module for module in names if _is_compiled(module)]:
        for inner in list(compiled.modules())[1:]:
            names.pop(inner, None)
    starts: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        starts.append(torch.autograd._get_sequence_nr())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        spans.append((starts.pop(), torch.autograd._get_sequence_nr(), names[module]))

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _named_modules(function: Any) -> Iterator[tuple[str, nn.Module]]:
    """Also of the modules that a function refers to."""
    if isinstance(function, nn.Module):
        yield from function.named_modules()
    elif inspect.isfunction(function):
        referred = inspect.getclosurevars(function)
        for name, value in {**referred.globals, **referred.nonlocals}.items():
            if isinstance(value, nn.Module):
                yield from value.named_modules(prefix=name)


def _place(node: Node, spans: list[_Span]) -> str | None:
    number = node._sequence_nr()
    for start, end, name in spans:
        if start <= number < end:
            return name
    # What anomaly mode keeps: the frames of the call, the innermost last.
    frames = "".join(node.metadata.get("traceback_", ())).split('File "')[1:]
    for frame in reversed(frames):
        if found := re.match(r'(?!.*[/\\]torch[/\\])(.+?)", line (\d+)', frame):
            return f"{found[1]}:{found[2]}"
    return None


def _lines(finding: Finding) -> str:
    shown = ", ".join(finding.modules[:4]) + (", ..." if len(finding.modules) > 4 else "")
    cost = f" ({finding.excess_bytes / 1e6:.1f} MB too much)" if finding.excess_bytes else ""
    lines = [f"{finding.kind:7}{finding.count:4} x {finding.op}" + (f" in {shown}" if shown else "")]
    lines.append(f"{'':14}{finding.why}{cost}")
    if finding.remedy:
        lines.append(f"{'':14}remedy: {finding.remedy}")
    return "\n".join(lines)
