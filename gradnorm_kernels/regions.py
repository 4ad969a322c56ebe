"""Compiled regions that can be differentiated twice.

Dynamo captures a region, guards it, and hands its graph to `Backend`. There the region, its first gradients
and the gradients of these are traced as one graph of ATen ops, whose inputs become known in four stages: the
region's own; the gradients of its outputs; what comes back to its first gradients; and the gradients of its
outputs in the second backward pass. The graph is cut between the stages, where least has to be kept, and each
piece is compiled. The autograd Functions around the pieces are those of `checkpoint`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checkpoint import (
    Call,
    First,
    Gradients,
    autocast_state,
    autocasting,
    grad,
    pairs,
    present,
)

Values = Sequence[Any]  # tensors, and integers where shapes are symbolic


class _Stage(NamedTuple):
    """What comes after the forward, after the first gradients or after what comes back to them.

    Attributes:
        given: of which tensors the gradients come with it.
        wanted: of which tensors the gradients are its results. Both are indices of the differentiable outputs
            or of the inputs.
    """

    given: tuple[int, ...]
    wanted: tuple[int, ...]


# The stages so far; none in the forward.
Chain = tuple[_Stage, ...]


class _Joint(NamedTuple):
    """A graph of several stages, the forward first.

    Attributes:
        inputs: of each stage the placeholders that come with it.
        results: of each stage what it returns, None for a gradient that is none.
        updated: of each of the region's inputs its value in the end.
        fixed: values of the forward that nobody can compute again.
        keys: of each node what it computes, the same in the other joints of the region.
    """

    graph: fx.GraphModule
    inputs: list[list[fx.Node]]
    results: list[list[Any]]
    updated: list[Any]
    fixed: list[fx.Node]
    keys: dict[fx.Node, str]

    def nodes(self) -> dict[str, fx.Node]:
        return {key: node for node, key in reversed(self.keys.items())}


class _Piece(NamedTuple):
    """A compiled stage.

    Attributes:
        inputs: the indices of its inputs among the values that are there before it.
        results: for each result its index among the function's, None for a gradient that is none.
        kept: likewise for what later stages need.
    """

    function: Callable[..., Sequence[Any]]
    inputs: list[int]
    results: list[int | None]
    kept: list[int]


class _Region:
    """A graph of Dynamo's, and its derivatives as they are asked for.

    Args:
        inputs: fake tensors, and integers.
        options: of :func:`torch.compile`, for the pieces.

    Attributes:
        saved: indices of the inputs that are tensors and are not changed in place.
        differentiable: indices of the outputs that require a gradient.
    """

    differentiable: list[int]

    def __init__(self, graph: fx.GraphModule, inputs: Values, options: dict[str, Any]) -> None:
        self._graph, self._inputs = graph, inputs
        is_symbolic = any(isinstance(value, torch.SymInt) for value in inputs)
        self._options = {**options, "dynamic": is_symbolic}
        self._autocast = autocast_state()
        self._mode: Any = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), FakeTensorMode())
        self._joints: dict[Chain, _Joint] = {}
        self._kept: dict[Chain, list[str]] = {}
        self._numbers: dict[str, int] = {}
        self._pieces: dict[tuple[Chain, bool], _Piece] = {}
        self._guards: int | None = None
        self._changed: list[int] = []
        traced = self._joint(())
        self._changed = [
            i
            for i, value in enumerate(inputs)
            if isinstance(value, Tensor) and traced.updated[i] is not traced.inputs[0][i]
        ]
        if self._changed:
            self._joints.clear()
        self.saved = [
            i for i, value in enumerate(inputs) if isinstance(value, Tensor) and i not in self._changed
        ]
        self._variables = tuple(i for i in self.saved if inputs[i].requires_grad)
        self._all_outputs = tuple(range(len(self.differentiable)))
        if self.differentiable and torch.is_grad_enabled():
            # What is learned of symbolic shapes until here, Dynamo guards.
            self._piece((), True)
            self._joint((_Stage(self._all_outputs, self._variables),))
        if is_symbolic and self._mode.shape_env is not None:
            self._guards = len(self._mode.shape_env.guards)

    def __call__(self, *args: Any) -> list[Any]:
        is_recorded = bool(self.differentiable) and torch.is_grad_enabled()
        results, kept = self._run(self._piece((), is_recorded), args)
        if is_recorded:
            variables = [*(args[i] for i in self.saved), *kept]
            recorded = _RegionCall(self, args).record([results[i] for i in self.differentiable], variables)
            for i, output in zip(self.differentiable, recorded, strict=True):
                results[i] = output
        return results

    def again(self, inputs: Values) -> list[Tensor]:
        """The differentiable outputs, by the ops of the graph, which is not compiled."""
        if self._joint(()).fixed:
            raise RuntimeError(
                "gradnorm_kernels.compile: a region that draws random numbers or changes buffers has no third"
                " derivative; take that of the model that is not compiled"
            )
        outputs = self._call(inputs)
        return [outputs[i] for i in self.differentiable]

    def stage(
        self, chain: Chain, values: Values, given: Sequence[Tensor], keep: bool
    ) -> tuple[list[Any], list[Tensor]]:
        """The results of the last stage of ``chain``, and, if asked for, what later ones need.

        Args:
            values: those of the stages before.
            given: the gradients that come with this one.
        """
        placeholders = self._joint(chain).inputs[len(chain)]
        given = [_laid_out_like(g, p.meta["val"]) for g, p in zip(given, placeholders, strict=True)]
        return self._run(self._piece(chain, keep), [*values, *given])

    def count_kept(self, chain: Chain) -> int:
        return len(self._keys(chain))

    def _run(self, piece: _Piece, values: Values) -> tuple[list[Any], list[Tensor]]:
        inputs = [values[i] for i in piece.inputs]
        with torch.no_grad(), _without_autocast():
            # Whether one requires a gradient would be guarded.
            found = piece.function(*(v.detach() if isinstance(v, Tensor) else v for v in inputs))
        return [None if i is None else found[i] for i in piece.results], [found[i] for i in piece.kept]

    def _call(self, inputs: Values) -> list[Any]:
        # Other kinds of attention have no double backward.
        with torch.enable_grad(), autocasting(self._autocast), sdpa_kernel(SDPBackend.MATH):
            return list(self._graph(*inputs))

    def _likely(self, chain: Chain) -> Chain:
        """``chain`` and what most often follows, for which is kept what is kept."""
        if not chain:
            inputs = tuple(i for i in self._variables if not isinstance(self._inputs[i], nn.Parameter))
            chain = (_Stage(self._all_outputs, inputs or self._variables),)
            if not inputs:
                return chain
        if len(chain) == 1:
            results = self._joint(chain).results[1]
            returned = tuple(i for i, node in zip(chain[0].wanted, results, strict=True) if node is not None)
            chain = (*chain, _Stage(returned, chain[0].given))
        if len(chain) == 2:
            chain = (*chain, _Stage(self._all_outputs, self._variables))
        return chain

    def _piece(self, chain: Chain, keep: bool) -> _Piece:
        if (chain, keep) not in self._pieces:
            kept = self._keys(chain) if keep else []
            joint = self._joint(self._likely(chain) if keep else chain)
            nodes, results = joint.nodes(), joint.results[len(chain)]
            held = [*self._held(chain, joint), *joint.inputs[len(chain)]]
            outputs = list(dict.fromkeys([*filter(None, results), *(nodes[key] for key in kept)]))
            changes = {} if chain else {joint.inputs[0][i]: joint.updated[i] for i in self._changed}
            module, inputs = _extract(joint, held, outputs, changes)
            place = {node: i for i, node in enumerate(outputs)}
            self._pieces[chain, keep] = _Piece(
                _compiled_when_called(module, self._options),
                inputs,
                [None if node is None else place[node] for node in results],
                [place[nodes[key]] for key in kept],
            )
        return self._pieces[chain, keep]

    def _held(self, chain: Chain, joint: _Joint) -> list[fx.Node | None]:
        """The values before those that come with the last stage of ``chain``, None where one is gone."""
        nodes, held = joint.nodes(), []
        for k in range(len(chain)):
            held += [
                None if k == 0 and i in self._changed else node for i, node in enumerate(joint.inputs[k])
            ]
            held += [nodes.get(key) for key in self._keys(chain[:k])]
        return held

    def _keys(self, chain: Chain) -> list[str]:
        """What is kept after the last stage of ``chain``."""
        if chain not in self._kept:
            likely = self._likely(chain)
            self._kept[chain] = []
            # A stage without results is not run.
            if len(likely) > len(chain) and (not chain or chain[-1].wanted):
                self._kept[chain] = self._cut(self._joint(likely), chain)
        return self._kept[chain]

    def _cut(self, joint: _Joint, chain: Chain) -> list[str]:
        k, nodes = len(chain), {node.name: node for node in joint.keys}
        before = [node for node in [*self._held(chain, joint), *joint.inputs[k]] if node is not None]
        after = [node for placeholders in joint.inputs[k + 1 :] for node in placeholders]
        now = _present(joint.results[k])
        rest = _present(node for results in joint.results[k + 1 :] for node in results)
        # They come as inputs here, so that they are kept rather than computed again.
        fixed = [] if chain else joint.fixed
        module, _ = _extract(joint, [*before, *fixed, *after], [*now, *rest], {}, {*after})
        _, backward = min_cut_rematerialization_partition(
            module, (), num_fwd_outputs=len(now), static_lifetime_input_indices=[*range(len(before))]
        )
        found = [nodes[n.name] for n in backward.graph.nodes if n.op == "placeholder" and n.name in nodes]
        kept = [node for node in dict.fromkeys([*fixed, *found]) if node not in before]
        kept = [node for node in kept if isinstance(node.meta["val"], Tensor)]
        # A result that shares their memory is kept as well, so that a change of it in place is noticed.
        storages = set(map(_storage, kept))
        kept += [node for node in now if node not in kept and _storage(node) in storages]
        return [joint.keys[node] for node in kept]

    def _joint(self, chain: Chain) -> _Joint:
        """One that begins with ``chain``."""
        for known, joint in self._joints.items():
            if known[: len(chain)] == chain:
                return joint
        joint = self._joints[chain] = self._trace(chain)
        if self._guards is not None and len(self._mode.shape_env.guards) > self._guards:
            raise RuntimeError(
                "gradnorm_kernels.compile: these gradients depend on the shapes in a way that the forward"
                " does not; pass dynamic=False"
            )
        return joint

    def _trace(self, chain: Chain) -> _Joint:
        counts: list[int] = []

        def run(*values: Any) -> list[Any]:
            remaining = iter(values)
            inputs = [next(remaining) for _ in self._inputs]
            given = [[next(remaining) for _ in stage.given] for stage in chain]
            for i in self._changed:
                inputs[i] = inputs[i].clone()
            leaves = [
                value.detach().requires_grad_() if isinstance(fake, Tensor) and fake.requires_grad else value
                for value, fake in zip(inputs, self._inputs, strict=True)
            ]
            outputs = self._call(leaves)
            self.differentiable = [
                i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.requires_grad
            ]
            with torch.enable_grad(), _without_autocast():
                found = _derivatives(chain, leaves, [outputs[i] for i in self.differentiable], given)
            results = [outputs, *found, inputs]
            counts[:] = map(len, results)
            return [value for group in results for value in group]

        with self._mode, enable_python_dispatcher(), torch.no_grad():
            gradients = [torch.empty_like(v) for v in self._like(chain)]
            inputs = [v.detach() if isinstance(v, Tensor) else v for v in self._inputs]
            graph = make_fx(dispatch_functionalize(run))(*inputs, *gradients)
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            # Of a saved tensor there is a new one at each use, and what is computed of it would seem new.
            node.replace_all_uses_with(node.args[0])
        graph.graph.eliminate_dead_code()
        keys = self._merge(graph.graph)
        *placeholders, output = [n for n in graph.graph.nodes if n.op in ("placeholder", "output")]
        sizes = [len(self._inputs), *(len(stage.given) for stage in chain)]
        *results, updated = _split(output.args[0], counts)
        inputs, *given = _split(placeholders, sizes)
        fixed = [user for i in self._changed for user in inputs[i].users]
        for node in graph.graph.nodes:
            if _is_random(node):
                fixed += [node] if isinstance(node.meta["val"], Tensor) else list(node.users)
        return _Joint(graph, [inputs, *given], results, updated, fixed, keys)

    def _merge(self, graph: fx.Graph) -> dict[fx.Node, str]:
        """Leaves one node of those that compute the same; returns for each its op and operands.

        Calls that differ in the results that they are asked for become one that is asked for all of them: a
        double backward gives the gradient of the gradient in one stage, and the others in the next.
        Torch's own elimination of common subexpressions leaves some, of which a matrix product can follow.
        """
        keys: dict[fx.Node, str] = {}
        first: dict[str, fx.Node] = {}
        for i, node in enumerate(graph.nodes):
            if node.op in ("placeholder", "output"):
                keys[node] = f"{node.op} {i}"
                continue
            arguments = _named_arguments(node)
            arguments.pop("output_mask", None)
            key = f"{node.op} {node.target} {fx.map_arg(arguments, lambda operand: keys[operand])}"
            if _is_random(node):
                # Told apart by their order.
                key += f" {sum(map(_is_random, keys))}"
            # A number, because what contains its operands' keys would grow with the depth.
            keys[node] = f"node {self._numbers.setdefault(key, len(self._numbers))}"
            same = first.setdefault(keys[node], node)
            if same is not node:
                _add_mask(same, node)
                node.replace_all_uses_with(same)
        for node in reversed(graph.nodes):
            if node.op == "call_function" and not node.users:
                graph.erase_node(node)
                del keys[node]
        return keys

    def _like(self, chain: Chain) -> list[Tensor]:
        """What the gradients that come with the stages are like."""
        if not chain:
            return []
        results = self._joint(()).results[0]
        outputs = [results[i].meta["val"] for i in self.differentiable]
        of = [outputs, self._inputs, outputs]
        return [of[k][i] for k, stage in enumerate(chain) for i in stage.given]


def _derivatives(
    chain: Chain, leaves: Values, outputs: Sequence[Tensor], given: Sequence[Sequence[Tensor]]
) -> list[Gradients]:
    """The results of the stages."""
    if not chain:
        return []
    incoming = dict(zip(chain[0].given, (g.detach().requires_grad_() for g in given[0]), strict=True))
    targets = [(outputs[i], g) for i, g in incoming.items()]
    first = grad(targets, [leaves[i] for i in chain[0].wanted], create_graph=len(chain) > 1)
    results = [first]
    if len(chain) > 1:
        of = dict(zip(chain[0].wanted, first, strict=True))
        targets = pairs([of[i] for i in chain[1].given], given[1])
        targets = [pair for pair in targets if pair[0].requires_grad]
        results.append(grad(targets, [incoming[i] for i in chain[1].wanted], retain_graph=True))
    if len(chain) > 2:
        targets += [(outputs[i], g) for i, g in zip(chain[2].given, given[2], strict=True)]
        results.append(grad(targets, [leaves[i] for i in chain[2].wanted]))
    return results


def _extract(
    joint: _Joint,
    held: Sequence[fx.Node | None],
    outputs: Sequence[fx.Node],
    changes: dict[fx.Node, fx.Node],
    tangents: Iterable[fx.Node] = (),
) -> tuple[fx.GraphModule, list[int]]:
    """The part of the graph that leads from ``held`` to ``outputs``, and the indices of what it uses.

    Args:
        changes: placeholders, and what is written into them in the end.
        tangents: which of ``held`` a partitioner is to take for inputs of the second part.
    """
    available, needed = {node for node in held if node is not None}, set()
    stack = [*outputs, *changes, *changes.values()]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += () if node in available else node.all_input_nodes
    graph, copies = fx.Graph(), {}
    # For a partitioner all are inputs, used or not.
    used = {i: node for i, node in enumerate(held) if node is not None and (tangents or node in needed)}
    for i, node in used.items():
        name = f"tangents_{i}" if node in tangents else node.name
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    for node in joint.graph.graph.nodes:
        if node in needed and node not in copies:
            if node.op == "placeholder":
                raise AssertionError(f"{node.name} is not known yet")
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for placeholder, value in changes.items():
        graph.call_function(torch.ops.aten.copy_.default, (copies[placeholder], copies[value]))
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(joint.graph, graph), list(used)


def _compiled_when_called(module: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Sequence[Any]]:
    @functools.cache
    def compiled() -> Callable[..., Sequence[Any]]:
        # While Dynamo captures a region, it marks all code that fx generates as code not to be compiled.
        module.recompile()
        return torch.compile(module.forward, **options)

    return lambda *args: compiled()(*args)


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else map(str, range(len(node.args)))
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _add_mask(node: fx.Node, other: fx.Node) -> None:
    """Asks ``node`` also for the results that ``other``, the same call, is asked for."""
    arguments = _named_arguments(node)
    if "output_mask" not in arguments:
        return
    masks = arguments["output_mask"], _named_arguments(other)["output_mask"]
    wanted = [any(pair) for pair in zip(*masks, strict=True)]
    if "output_mask" in node.kwargs:
        node.update_kwarg("output_mask", wanted)
    else:
        node.update_arg([*arguments].index("output_mask"), wanted)
    values = zip(node.meta["val"], other.meta["val"], strict=True)
    node.meta["val"] = tuple(b if a is None else a for a, b in values)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _present(nodes: Iterable[fx.Node | None]) -> list[fx.Node]:
    return list(dict.fromkeys(node for node in nodes if node is not None))


def _split(values: Sequence[Any], sizes: Iterable[int]) -> list[list[Any]]:
    remaining = iter(values)
    return [[next(remaining) for _ in range(size)] for size in sizes]


def _storage(node: fx.Node) -> int | None:
    value = node.meta["val"]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, dense in the order of ``like``'s strides, for which the graph was traced."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda i: -strides[i])
    permuted = tensor.permute(order)
    if permuted.is_contiguous():
        return tensor
    return permuted.contiguous().permute([order.index(i) for i in range(len(order))])


def _without_autocast() -> ExitStack:
    return autocasting([(kind, dtype, False) for kind, dtype, enabled in autocast_state() if enabled])


class _RegionCall(Call):
    """One call of a region."""

    def __init__(self, region: _Region, args: Values) -> None:
        super().__init__()
        self._region = region
        self._others = [None if isinstance(value, Tensor) else value for value in args]

    def split(self, variables: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return (), variables

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self._region.again(self._values(inputs)[: len(self._others)])

    def first_gradients(
        self, variables: Sequence[Tensor], wanted: Sequence[int], incoming: Gradients
    ) -> tuple[Gradients, Sequence[Tensor]]:
        chain = (self._stage(incoming, wanted),)
        return self._region.stage(chain, self._values(variables), present(incoming), keep=True)

    def transposed(
        self, leaves: Sequence[Tensor], arguments: Sequence[Tensor], first: First
    ) -> tuple[Gradients, Sequence[Tensor]]:
        if torch.is_grad_enabled():
            return super().transposed(leaves, arguments, first)
        chain, values, returned = self._second(arguments, first)
        found, kept = self._region.stage(chain, values, returned, keep=True)
        results = iter(found)
        return [next(results) if needed else None for needed in first.needed], [*first.kept, *kept]

    def gradients(
        self,
        leaves: Sequence[Tensor],
        arguments: Sequence[Tensor],
        wanted: Sequence[int],
        incoming: Gradients,
        pending: list[First],
    ) -> Gradients:
        if torch.is_grad_enabled():
            return super().gradients(leaves, arguments, wanted, incoming, pending)
        if not pending:
            plain = (self._stage(incoming, wanted),)
            found, _ = self._region.stage(plain, self._values(arguments), present(incoming), keep=False)
            return found
        total: list[Tensor | None] = [None] * len(wanted)
        for first in pending:
            chain, values, returned = self._second(arguments, first)
            kept = first.kept[self._region.count_kept(chain[:1]) :]
            chain = (*chain, self._stage(incoming, wanted))
            found, _ = self._region.stage(chain, [*values, *returned, *kept], present(incoming), keep=False)
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, found, strict=True)]
            incoming = [None] * len(incoming)
        return total

    def _second(self, arguments: Sequence[Tensor], first: First) -> tuple[Chain, list[Any], list[Tensor]]:
        """The stages up to the second, the values before it, and what comes with it."""
        saved = self._region.saved
        needed = tuple(i for i, needed in enumerate(first.needed) if needed)
        second = _Stage(tuple(saved[i] for i, _ in first.returned), needed)
        chain = (self._stage(first.incoming, first.wanted), second)
        kept = first.kept[: self._region.count_kept(chain[:1])]
        values = [*self._values(arguments), *present(first.incoming), *kept]
        returned = [gradient for _, gradient in first.returned]
        return chain, values, returned

    def _stage(self, incoming: Gradients, wanted: Sequence[int]) -> _Stage:
        given = tuple(i for i, gradient in enumerate(incoming) if gradient is not None)
        return _Stage(given, tuple(self._region.saved[i] for i in wanted))

    def _values(self, variables: Sequence[Tensor]) -> list[Any]:
        saved, values = self._region.saved, list(self._others)
        for i, tensor in zip(saved, variables, strict=False):
            values[i] = tensor
        return values + list(variables[len(saved) :])


class Backend:
    """Dynamo's, which is given the graph of a region's forward and returns what runs it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        placeholders = graph.graph.find_nodes(op="placeholder")
        for node in graph.graph.nodes:
            if isinstance(node.target, HigherOrderOperator):
                # Dynamo's own of a custom autograd Function has a wrong second derivative.
                raise RuntimeError(
                    f"gradnorm_kernels.compile: cannot differentiate {node.target} twice; keep the function"
                    " that leads to it out of the region by torch.compiler.disable"
                )
        try:
            return _Region(graph, [node.meta["example_value"] for node in placeholders], self._options)
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"gradnorm_kernels.compile: runs a region without compiling it: {reason}", stacklevel=2
            )
            return graph
