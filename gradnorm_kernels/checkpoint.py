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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .diagnose import graph_nodes

__all__ = ["checkpoint", "checkpoint_modules"]

Model = TypeVar("Model", bound=nn.Module)
Node = Any  # of an autograd graph
Gradients = Sequence[Tensor | None]
# Of each kind of device: its name, the dtype, and whether autocast is on.
Autocast = list[tuple[str, torch.dtype, bool]]


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
    call = _Checkpointed(function, args, kwargs, preserve_rng_state)
    start = torch.autograd._get_sequence_nr()
    inputs = _as_leaves(call.tensors)
    versions = [tensor._version for tensor in inputs]
    outputs, structure = tree_flatten(call.first(inputs))
    if versions != [tensor._version for tensor in inputs]:
        raise RuntimeError("checkpoint: function changes an argument in place; give it a copy")
    differentiable = [i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.requires_grad]
    if not differentiable:
        return tree_unflatten(outputs, structure)
    leaves = _leaves([outputs[i] for i in differentiable], inputs, start)
    arguments, call.tensors, call.differentiable = call.tensors, [], differentiable
    recorded = call.record([outputs[i] for i in differentiable], [*arguments, *leaves])
    for i, output in zip(differentiable, recorded, strict=True):
        outputs[i] = output
    return tree_unflatten(outputs, structure)


class First(NamedTuple):
    """First gradients that were taken under ``create_graph``, in the backward pass that differentiates them.

    Attributes:
        wanted: whose gradients they are: indices of the variables.
        incoming: the gradients of the outputs that they were computed from.
        returned: what came back to them, each with the index of its variable.
        needed: of which of the incoming ones `Call.transposed` computes the gradients.
        kept: what `Call.first_gradients` kept, and then `Call.transposed`.
    """

    wanted: Sequence[int]
    incoming: Gradients
    returned: list[tuple[int, Tensor]]
    needed: list[bool]
    kept: Sequence[Tensor]


class Call:
    """A call of a function, which `record` records, and its gradients: here by calling it again.

    Attributes:
        arguments: how many of the variables are its arguments; leaves that it reads follow.
        differentiable: which of the function's outputs require a gradient.
        pending: of each backward pass under way, what `_Gradient` left to `_Forward`.
    """

    arguments: int
    differentiable: list[int]

    def __init__(self) -> None:
        self.pending: dict[int, list[First]] = {}

    def record(self, outputs: Sequence[Tensor], variables: Sequence[Tensor]) -> list[Tensor]:
        """The differentiable ``outputs``, with a graph that leads to ``variables``."""
        *recorded, _ = _Forward.apply(self, [output.detach() for output in outputs], *variables)
        return recorded

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs that require a gradient, with a graph that ends at ``inputs`` and at leaves."""
        raise NotImplementedError

    def first_gradients(
        self, variables: Sequence[Tensor], wanted: Sequence[int], incoming: Gradients
    ) -> tuple[Gradients, Sequence[Tensor]]:
        """The gradients under ``create_graph``, and what `transposed` is to be given of them."""
        return self.gradients(*self.split(variables), wanted, incoming, []), ()

    def gradients(
        self,
        leaves: Sequence[Tensor],
        arguments: Sequence[Tensor],
        wanted: Sequence[int],
        incoming: Gradients,
        pending: list[First],
    ) -> Gradients:
        """Of the outputs times ``incoming``, and of the first gradients times what came back to them.

        Args:
            wanted: whose gradients are asked for: indices of the arguments, followed by the leaves.
        """
        create_graph = torch.is_grad_enabled()
        inputs, outputs = self._recomputed(leaves, arguments)
        with torch.enable_grad(), _without_hooks(inputs):
            targets = pairs(outputs, incoming)
            for first in pending:
                indices, cotangents = zip(*first.returned, strict=True)
                found = grad(pairs(outputs, first.incoming), [inputs[i] for i in indices], create_graph=True)
                targets += [pair for pair in pairs(found, cotangents) if pair[0].requires_grad]
            return grad(targets, [inputs[i] for i in wanted], create_graph)

    def transposed(
        self, leaves: Sequence[Tensor], arguments: Sequence[Tensor], first: First
    ) -> tuple[Gradients, Sequence[Tensor]]:
        """The gradients of the incoming gradients, and what `gradients` is to be given of it."""
        create_graph = torch.is_grad_enabled()
        inputs, outputs = self._recomputed(leaves, arguments)
        with torch.enable_grad(), _without_hooks(inputs):
            # First gradients are linear in them, so that any value will do, and of zeros least is computed.
            incoming = [
                torch.zeros_like(g) if g is not None and needed else None
                for g, needed in zip(first.incoming, first.needed, strict=True)
            ]
            with _Zeros(present(incoming)):
                for zeros in present(incoming):
                    zeros.requires_grad_()
                indices, cotangents = zip(*first.returned, strict=True)
                gradients = grad(pairs(outputs, incoming), [inputs[i] for i in indices], create_graph=True)
            targets = [pair for pair in pairs(gradients, cotangents) if pair[0].requires_grad]
            found = iter(grad(targets, present(incoming), create_graph))
        return [None if g is None else next(found) for g in incoming], ()

    def split(self, variables: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The leaves and the arguments."""
        return variables[self.arguments :], variables[: self.arguments]

    def _recomputed(
        self, leaves: Sequence[Tensor], arguments: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        # Under create_graph they are leaves already, of the checkpoint that this is called in.
        inputs = arguments if torch.is_grad_enabled() else _as_leaves(arguments)
        return [*inputs, *leaves], self.again(inputs)


class _Checkpointed(Call):
    """One call of a function, which can be made again as it was the first time."""

    def __init__(
        self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], preserve_rng_state: bool
    ) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        super().__init__()
        self._function = function
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.arguments = len(self._places)
        self.tensors: list[Tensor] = [leaves[i] for i in self._places]
        devices = dict.fromkeys(t.device for t in self.tensors if t.device.type == "cuda")
        self._random_state = (
            {device: torch.cuda.get_rng_state(device) for device in devices} if preserve_rng_state else None
        )
        self._cpu_random_state = torch.get_rng_state() if preserve_rng_state else None
        self._autocast = autocast_state()
        self._modules: list[tuple[nn.Module, bool, dict[str, Tensor]]] = []

    def first(self, inputs: Sequence[Tensor]) -> Any:
        """Makes the call, and notes what it would find changed when it is made again."""
        thread, seen = threading.get_ident(), {}

        def note(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread and module not in seen:
                before = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
                seen[module] = module.training, before, [b._version for b in _buffers(module)]

        handle = register_module_forward_pre_hook(note)
        try:
            with autocasting(self._autocast):
                result = self._call(inputs)
        finally:
            handle.remove()
        for module, (training, before, versions) in seen.items():
            # The running statistics of some kernels change without a count of it.
            if not training and versions == [b._version for b in _buffers(module)]:
                before.clear()
            self._modules.append((module, training, before))
        return result

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs that require a gradient, with a graph that ends at ``inputs`` and at leaves."""
        with torch.enable_grad(), self._random_numbers(), autocasting(self._autocast), self._module_states():
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

    @contextmanager
    def _module_states(self) -> Iterator[None]:
        before = [(module, module.training, dict(module._buffers)) for module, _, _ in self._modules]
        try:
            for module, training, buffers in self._modules:
                module.training = training
                module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
            yield
        finally:
            for module, training, own in before:
                module.training = training
                module._buffers.update(own)


class _Forward(torch.autograd.Function):
    """The function's node. Its last output is empty, and makes it wait for `_Gradient` in a backward pass."""

    @staticmethod
    def forward(ctx: Any, call: Call, outputs: list[Tensor], *variables: Tensor) -> tuple[Tensor, ...]:
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
            found = _Gradient.apply(call, variables, wanted, gradients, link, *present(gradients))
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
        call: Call,
        variables: Sequence[Tensor],
        wanted: list[int],
        incoming: Gradients,
        link: Tensor,
        *present: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.call, ctx.wanted = call, wanted
        ctx.count, ctx.outputs = len(variables), len(incoming)
        ctx.set_materialize_grads(False)
        found, kept = call.first_gradients(variables, wanted, incoming)
        ctx.save_for_backward(*variables, *incoming, *kept)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *returned: Tensor | None) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        variables, rest = saved[: ctx.count], saved[ctx.count :]
        incoming, kept = rest[: ctx.outputs], rest[ctx.outputs :]
        rows = [(i, g) for i, g in zip(ctx.wanted, returned, strict=True) if g is not None]
        (forward, _), *nodes = ctx.next_functions
        executed = iter([_is_executed(node) for node, _ in nodes])
        needed = [g is not None and next(executed) for g in incoming]
        first = First(ctx.wanted, incoming, rows, needed, kept)
        found: Gradients = [None] * len(needed)
        if rows and any(needed):
            leaves, arguments = call.split(variables)
            transposed = functools.partial(call.transposed, leaves)
            if torch.is_grad_enabled():
                transposed = functools.partial(checkpoint, transposed)
            found, kept = transposed(arguments, first)
            first = first._replace(kept=kept)
        link = None
        if rows and _is_executed(forward):
            if not torch.is_grad_enabled():
                first = first._replace(incoming=[None if g is None else g.detach() for g in incoming])
            call.pending.setdefault(torch._C._current_graph_task_id(), []).append(first)
            link = rows[0][1].new_empty(0)
        present = [g for g, given in zip(found, incoming, strict=True) if given is not None]
        return None, None, None, None, link, *present


class _Zeros(TorchDispatchMode):
    """Computes no product of a tensor that is known to be zero, and no gradient that it comes back as."""

    def __init__(self, zeros: Sequence[Tensor]) -> None:
        super().__init__()
        # Of the storages, which are kept so that no other one has their place.
        self._known = {_storage(tensor): tensor for tensor in zeros}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        zero = [_storage(t) in self._known for t in tensors]
        name = func._schema.name.partition("::")[2]
        if func.is_view or not any(zero) or {*map(type, tensors)} - {Tensor, nn.Parameter}:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            for tensor in tensors:
                self._known.pop(_storage(tensor), None)
        elif (
            name in _PRODUCTS
            or (zero[0] and (name in _LINEAR or ("_backward" in name and "double" not in name)))
            or (all(zero) and name in _SUMS)
        ):
            with _disable_current_modes():
                like = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
            result = tree_map(functools.partial(_zeros_like, device=tensors[0].device), like)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._known[_storage(tensor)] = tensor
            return result
        return func(*args, **kwargs)


# Ops whose results are zero if an operand is, if the first one is (like those of all first gradients), or
# if all are.
_PRODUCTS = {"bmm", "mm", "mul"}
_LINEAR = {"_to_copy", "_unsafe_view", "clone", "div", "neg", "permute_rows", "sum"}
_SUMS = {"add", "cat", "sub"}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros_like(value: Any, device: torch.device) -> Any:
    return torch.zeros_like(value, device=device) if isinstance(value, Tensor) else value


def autocast_state() -> Autocast:
    return [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in ("cpu", "cuda")
        if kind == "cpu" or torch.cuda.is_available()
    ]


def autocasting(state: Autocast) -> ExitStack:
    stack = ExitStack()
    for kind, dtype, enabled in state:
        # A cached copy of a weight would lead out of the graph.
        stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
    return stack


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


def grad(
    targets: list[tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Gradients:
    """Of the targets' outputs times the gradients beside them; None of what they do not depend on."""
    if not targets or not inputs:
        return [None] * len(inputs)
    outputs, gradients = zip(*targets, strict=True)
    return torch.autograd.grad(outputs, inputs, gradients, retain_graph, create_graph, allow_unused=True)


def pairs(outputs: Gradients, gradients: Gradients) -> list[tuple[Tensor, Tensor]]:
    both = zip(outputs, gradients, strict=True)
    return [(o, g) for o, g in both if o is not None and g is not None]


def present(gradients: Gradients) -> list[Tensor]:
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
    Calling this again changes nothing, and :func:`fuse`, :func:`unfuse` and :func:`compile_modules` work
    before and after.

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
    for block in blocks_of(model, select, "checkpoint_modules", undo):
        wrap_forward(block, checkpoint, undo)
    return model


def blocks_of(
    model: nn.Module, select: Callable[[str, nn.Module], bool] | None, caller: str, undo: bool
) -> list[nn.Module]:
    """The modules whose forward ``caller`` wraps, or where it may have: all."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if undo:
        return list(model.modules())
    blocks = _blocks(model) if select is None else [m for name, m in model.named_modules() if select(name, m)]
    if not blocks:
        raise ValueError(f"{caller}: found no blocks in model; name some by select")
    return blocks


def wrap_forward(module: nn.Module, wrapper: Callable[..., Any], undo: bool = False) -> None:
    """Calls ``wrapper(forward, *args, **kwargs)`` in place of ``forward``, once for each type of wrapper."""
    wrappers: list[Callable[..., Any]] = [] if undo else [wrapper]
    forward: Any = module.__dict__.get("forward")
    while getattr(forward, "func", None) is _forward:
        found, _, forward = forward.args
        if type(found) is not type(wrapper):
            wrappers.append(found)
    # Without a class of its own, because fuse looks at the class. A checkpoint recomputes what is compiled.
    for inner in sorted(wrappers, key=lambda found: found is checkpoint):
        forward = functools.partial(_forward, inner, module, forward)
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.forward = forward


def _forward(
    wrapper: Callable[..., Any],
    module: nn.Module,
    before: Callable[..., Any] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    function = functools.partial(type(module).forward, module) if before is None else before
    return wrapper(function, *args, **kwargs)


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
