"""Double rematerialisation: a function's intermediate results are computed again in each backward pass.

Level 0, the forward pass, keeps the function's inputs. Level 1, the first backward pass, runs the function
again; under ``create_graph`` it keeps the inputs and the incoming gradients. Level 2, the second backward
pass, has two parts, because between them the rest of the model has its turn. `_Gradient.backward` passes on
the gradient of the incoming gradients. `_Forward.backward` then computes that of the inputs, through the
function and through its first gradients at once.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from .diagnose import graph_nodes

__all__ = ["checkpoint", "checkpoint_modules"]

Model = TypeVar("Model", bound=nn.Module)
Node = Any  # of an autograd graph
Gradients = Sequence[Tensor | None]
# Incoming gradients of a function, and by the indices of its variables what came back to their gradients.
Pending = tuple[Gradients, list[tuple[int, Tensor]]]


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool = False,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """Calls ``function(*args, **kwargs)`` and keeps its inputs instead of its intermediate results.

    Where :func:`torch.utils.checkpoint.checkpoint` recomputes them in the backward pass, this does so in the
    second one as well: a gradient taken with ``create_graph=True`` keeps the inputs and the incoming
    gradients alone. A third derivative is exact.

    The recomputations see the random numbers, the autocast state, and the modules' buffers and training mode
    of the first time, and change none of them: dropout draws once, BatchNorm counts a batch once. Hooks of
    modules inside ``function`` run again in each. Random numbers of CUDA are those of the devices of the
    arguments.

    It only calls ``function`` where gradients are disabled, in forward mode, in ``torch.func``'s transforms
    and while ``torch.compile`` traces. Values read from elsewhere than from arguments and modules have to
    be the same in each recomputation.

    Args:
        function: may return tensors nested in tuples, lists and dicts, beside other values. It must not
            change an argument in place.
        args, kwargs: of ``function``. Tensors nested in tuples, lists and dicts are arguments as well; any
            other tensor that it uses must be a leaf, such as a parameter.
        use_reentrant: False; for the signature of :func:`torch.utils.checkpoint.checkpoint`.
        preserve_rng_state: whether a recomputation draws the same random numbers.

    Raises:
        TypeError: if ``function`` is not callable.
        ValueError: if ``use_reentrant`` is true.
        RuntimeError: if ``function`` uses a tensor that is neither a leaf nor an argument, changes an
            argument in place, or returns something else in a recomputation.
    """
    if not callable(function):
        raise TypeError(f"checkpoint: expected function to be callable, got {type(function).__name__}")
    if use_reentrant:
        raise ValueError("checkpoint: use_reentrant=True cannot be differentiated twice")
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_transformed():
        return function(*args, **kwargs)
    call = _Call(function, args, kwargs, preserve_rng_state)
    start = torch.autograd._get_sequence_nr()
    inputs = _as_leaves(call.arguments)
    versions = [tensor._version for tensor in inputs]
    outputs, structure = tree_flatten(call.first(inputs))
    if versions != [tensor._version for tensor in inputs]:
        raise RuntimeError("checkpoint: function changes an argument in place; give it a copy")
    differentiable = [i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.requires_grad]
    if not differentiable:
        return tree_unflatten(outputs, structure)
    leaves = _leaves([outputs[i] for i in differentiable], inputs, start)
    arguments, call.arguments, call.differentiable = call.arguments, [], differentiable
    detached = [outputs[i].detach() for i in differentiable]
    *recorded, _ = _Forward.apply(call, detached, *arguments, *leaves)
    for i, output in zip(differentiable, recorded, strict=True):
        outputs[i] = output
    return tree_unflatten(outputs, structure)


class _Call:
    """One call of a function, which can be made again as it was the first time.

    Attributes:
        arguments: the tensors among the arguments, until they are saved elsewhere.
        differentiable: which of the function's outputs require a gradient.
        pending: of each backward pass under way, what `_Gradient` left to `_Forward`.
    """

    differentiable: list[int]

    def __init__(
        self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], preserve_rng_state: bool
    ) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        self._function = function
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.arguments: list[Tensor] = [leaves[i] for i in self._places]
        devices = dict.fromkeys(t.device for t in self.arguments if t.device.type == "cuda")
        self._random_state = (
            {device: torch.cuda.get_rng_state(device) for device in devices} if preserve_rng_state else None
        )
        self._cpu_random_state = torch.get_rng_state() if preserve_rng_state else None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", "cuda")
            if kind == "cpu" or torch.cuda.is_available()
        ]
        self._modules: list[tuple[nn.Module, bool, dict[str, Tensor]]] = []
        self.pending: dict[int, list[Pending]] = {}

    def first(self, inputs: Sequence[Tensor]) -> Any:
        """Makes the call, and notes what it would find changed when it is made again."""
        thread, seen = threading.get_ident(), {}

        def note(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread and module not in seen:
                before = {name: b.clone() for name, b in module._buffers.items() if b is not None}
                seen[module] = module.training, before, [b._version for b in _buffers(module)]

        handle = register_module_forward_pre_hook(note)
        try:
            with self._autocasting():
                result = self._call(inputs)
        finally:
            handle.remove()
        for module, (training, before, versions) in seen.items():
            # The running statistics of some kernels change without a count of it.
            if not training and versions == [b._version for b in _buffers(module)]:
                before = {}
            self._modules.append((module, training, before))
        return result

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs that require a gradient, with a graph that ends at ``inputs`` and at leaves."""
        with torch.enable_grad(), self._random_numbers(), self._autocasting(), self._module_states():
            outputs, _ = tree_flatten(self._call(inputs))
        try:
            found = [outputs[i] for i in self.differentiable]
            if all(output.requires_grad for output in found):
                return found
        except (AttributeError, IndexError):
            pass
        raise RuntimeError("checkpoint: function returned something else in its recomputation")

    def _call(self, inputs: Sequence[Tensor]) -> Any:
        leaves = list(self._others)
        for i, tensor in zip(self._places, inputs, strict=False):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self._function(*args, **kwargs)

    @contextmanager
    def _random_numbers(self) -> Iterator[None]:
        if self._random_state is None or self._cpu_random_state is None:
            yield
            return
        with torch.random.fork_rng(list(self._random_state), device_type="cuda"):
            torch.set_rng_state(self._cpu_random_state)
            for device, state in self._random_state.items():
                torch.cuda.set_rng_state(state, device)
            yield

    def _autocasting(self) -> ExitStack:
        stack = ExitStack()
        for kind, dtype, enabled in self._autocast:
            # A cached copy of a weight would lead out of the graph.
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack

    @contextmanager
    def _module_states(self) -> Iterator[None]:
        before = [(module, module.training, dict(module._buffers)) for module, _, _ in self._modules]
        try:
            for module, training, buffers in self._modules:
                module.training = training
                module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
            yield
        finally:
            for module, training, buffers in before:
                module.training = training
                module._buffers.update(buffers)

    def gradients(
        self,
        leaves: Sequence[Tensor],
        arguments: Sequence[Tensor],
        wanted: Sequence[int],
        incoming: Gradients,
        pending: list[Pending],
    ) -> Gradients:
        """Of the outputs times ``incoming``, and of the first gradients times what came back to them.

        Args:
            wanted: whose gradients are asked for: indices of the arguments, followed by the leaves.
        """
        create_graph = torch.is_grad_enabled()
        inputs, outputs = self._recomputed(leaves, arguments)
        with torch.enable_grad(), _without_hooks(inputs):
            targets = _pairs(outputs, incoming)
            for gradients, returned in pending:
                indices, cotangents = zip(*returned, strict=True)
                first = _grad(_pairs(outputs, gradients), [inputs[i] for i in indices], create_graph=True)
                targets += [pair for pair in _pairs(first, cotangents) if pair[0].requires_grad]
            return _grad(targets, [inputs[i] for i in wanted], create_graph)

    def transposed(
        self,
        leaves: Sequence[Tensor],
        arguments: Sequence[Tensor],
        returned: list[tuple[int, Tensor]],
        like: Gradients,
    ) -> Gradients:
        """The gradients of the incoming gradients, which have the form of ``like``."""
        create_graph = torch.is_grad_enabled()
        inputs, outputs = self._recomputed(leaves, arguments)
        with torch.enable_grad(), _without_hooks(inputs):
            # First gradients are linear in them, so that any value will do.
            incoming = [None if g is None else torch.zeros_like(g).requires_grad_() for g in like]
            indices, cotangents = zip(*returned, strict=True)
            first = _grad(_pairs(outputs, incoming), [inputs[i] for i in indices], create_graph=True)
            targets = [pair for pair in _pairs(first, cotangents) if pair[0].requires_grad]
            found = iter(_grad(targets, [g for g in incoming if g is not None], create_graph))
        return [None if g is None else next(found) for g in like]

    def split(self, variables: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The leaves and the arguments."""
        return variables[len(self._places) :], variables[: len(self._places)]

    def _recomputed(
        self, leaves: Sequence[Tensor], arguments: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        # Under create_graph they are leaves already, of the checkpoint that this is called in.
        inputs = arguments if torch.is_grad_enabled() else _as_leaves(arguments)
        return [*inputs, *leaves], self.again(inputs)


class _Forward(torch.autograd.Function):
    """The function's node. Its last output is empty, and makes it wait for `_Gradient` in a backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, outputs: list[Tensor], *variables: Tensor) -> tuple[Tensor, ...]:
        link = outputs[0].new_empty(0)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*variables, link)
        return *outputs, link

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        call, (*variables, link) = ctx.call, ctx.saved_tensors
        gradients = incoming[:-1]
        wanted = [i for i, (node, _) in enumerate(ctx.next_functions) if _is_executed(node)]
        pending = call.pending.pop(torch._C._current_graph_task_id(), [])
        leaves, arguments = call.split(variables)
        if not torch.is_grad_enabled():
            found = call.gradients(leaves, arguments, wanted, gradients, pending)
        elif not pending:
            found = _Gradient.apply(call, variables, wanted, gradients, link, *_present(gradients))
        else:
            third = functools.partial(call.gradients, leaves)
            found = checkpoint(third, arguments, wanted, gradients, pending)
        result: list[Tensor | None] = [None] * len(variables)
        for i, gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        return None, None, *result


class _Gradient(torch.autograd.Function):
    """The node of a function's first gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        variables: Sequence[Tensor],
        wanted: list[int],
        incoming: Gradients,
        link: Tensor,
        *present: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.call, ctx.wanted, ctx.count = call, wanted, len(variables)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*variables, *incoming)
        return tuple(call.gradients(*call.split(variables), wanted, incoming, []))

    @staticmethod
    def backward(ctx: Any, *returned: Tensor | None) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        variables, incoming = saved[: ctx.count], saved[ctx.count :]
        rows = [(i, g) for i, g in zip(ctx.wanted, returned, strict=True) if g is not None]
        (forward, _), *nodes = ctx.next_functions
        executed = iter([_is_executed(node) for node, _ in nodes])
        like = [g if g is not None and next(executed) else None for g in incoming]
        found: Gradients = [None] * len(like)
        if rows and any(g is not None for g in like):
            leaves, arguments = call.split(variables)
            transposed = functools.partial(call.transposed, leaves)
            if torch.is_grad_enabled():
                transposed = functools.partial(checkpoint, transposed)
            found = transposed(arguments, rows, like)
        link = None
        if rows and _is_executed(forward):
            if not torch.is_grad_enabled():
                incoming = [None if g is None else g.detach() for g in incoming]
            call.pending.setdefault(torch._C._current_graph_task_id(), []).append((incoming, rows))
            link = rows[0][1].new_empty(0)
        present = [g for g, given in zip(found, incoming, strict=True) if given is not None]
        return None, None, None, None, link, *present


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _as_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() if t.requires_grad else t for t in tensors]


def _leaves(outputs: Sequence[Tensor], inputs: Sequence[Tensor], start: int) -> list[Tensor]:
    """What ``outputs`` were computed from, beside ``inputs``, since the sequence number ``start``."""
    found, known = [], set(map(id, inputs))
    for node in graph_nodes(outputs):
        if hasattr(node, "variable"):
            if id(node.variable) not in known:
                found.append(node.variable)
        elif node._sequence_nr() < start:
            raise RuntimeError(
                f"checkpoint: function uses a tensor that {node.name()} made before the call;"
                " pass it as an argument"
            )
    return found


def _is_executed(node: Node) -> bool:
    """Whether the backward pass under way needs the gradients that ``node`` is given."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # It is a leaf, whose gradient torch.autograd.grad returns.
        return True


def _grad(
    targets: list[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], create_graph: bool = False
) -> Gradients:
    if not targets or not inputs:
        return [None] * len(inputs)
    outputs, gradients = zip(*targets, strict=True)
    return torch.autograd.grad(outputs, inputs, gradients, create_graph=create_graph, allow_unused=True)


def _pairs(outputs: Gradients, gradients: Gradients) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(outputs, gradients, strict=True)
    return [(o, g) for o, g in pairs if o is not None and g is not None]


def _present(gradients: Gradients) -> list[Tensor]:
    return [g for g in gradients if g is not None]


def _buffers(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module._buffers.values() if buffer is not None]


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Those on leaves, which run once the gradient of the whole model arrives there."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    try:
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def checkpoint_modules(
    model: Model, select: Callable[[str, nn.Module], bool] | None = None, *, undo: bool = False
) -> Model:
    """Lets the repeated blocks of ``model`` run under :func:`checkpoint`, in place, and returns ``model``.

    Each keeps its class, ``state_dict`` and hooks, which run once, and gains an attribute ``forward``.
    Calling this again changes nothing, and :func:`fuse` and :func:`unfuse` work before and after.

    Args:
        model: any module; the blocks are found in timm's models and in others built alike.
        select: of a module's qualified name and the module, whether it is a block. Without it, these are the
            modules of one class, two at least, side by side in a ``Sequential``, ``ModuleList``,
            ``ModuleDict`` or stage of timm's; if most of such a module is blocks in its turn, those.
        undo: remove that attribute from every module instead.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
        ValueError: if it has no such blocks.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"checkpoint_modules: expected model to be a torch.nn.Module, got {kind}")
    if undo:
        for module in filter(_is_checkpointed, model.modules()):
            _, before = module.__dict__.pop("forward").args
            if before is not None:
                module.forward = before
        return model
    blocks = _blocks(model) if select is None else [m for name, m in model.named_modules() if select(name, m)]
    if not blocks:
        raise ValueError("checkpoint_modules: found no blocks in model; name some by select")
    for block in blocks:
        if not _is_checkpointed(block):
            # Without a class of its own, because fuse looks at the class.
            block.forward = functools.partial(_forward, block, block.__dict__.get("forward"))
    return model


def _forward(module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    function = functools.partial(type(module).forward, module) if before is None else before
    return checkpoint(function, *args, **kwargs)


def _is_checkpointed(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _forward


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks inside ``module``."""
    children = list(module.children())
    repeats = [child for child in children if _is_composite(child)]
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        # A stage of timm's holds blocks itself, or a sequence of them.
        is_stage = hasattr(module, "grad_checkpointing")
        repeats = [child for child in repeats if is_stage and type(child) is not nn.Sequential]
    kinds = Counter(map(type, repeats))
    found: list[nn.Module] = []
    for child in children:
        inner = _blocks(child)
        if kinds[type(child)] > 1 and 2 * sum(map(_size, inner)) < _size(child):
            inner = [child]
        found += inner
    return found


def _is_composite(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
