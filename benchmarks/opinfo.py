"""PyTorch's own samples of its ops: what its tests of gradients run on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# This import forbids the whole process, and so other tests in it, to set cuDNN's switches.
with torch.backends.__allow_nonbracketed_mutation():
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import ReductionOpInfo

__all__ = ["OPS", "ReductionOpInfo", "samples_of"]

OPS = {op.full_name: op for op in op_db}
"""OpInfos by their full names."""


def samples_of(op: Any) -> Iterator[tuple[Callable[..., Any], list[Tensor]]]:
    """For every sample in float64 on the CPU a function of the tensors that require grad, and these."""
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        values, spec = tree_flatten(([sample.input, *sample.args], sample.kwargs))
        is_variable = [isinstance(value, Tensor) and value.requires_grad for value in values]

        def function(
            *variables: Tensor,
            sample: Any = sample,
            values: list[Any] = values,
            spec: Any = spec,
            is_variable: list[bool] = is_variable,
        ) -> Any:
            given = iter(variables)
            filled = [next(given) if v else value for value, v in zip(values, is_variable, strict=True)]
            args, kwargs = tree_unflatten(filled, spec)
            return sample.output_process_fn_grad(op.gradcheck_wrapper(op.op, *args, **kwargs))

        variables = [value for value, v in zip(values, is_variable, strict=True) if v]
        if variables:
            yield function, variables
