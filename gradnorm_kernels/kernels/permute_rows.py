"""The Triton kernel of permute_rows: whole rows, copied in accesses of 16 bytes.

PyTorch's index_select over one of three dimensions reads the index anew for each element.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NotCoveredError
from .common import DTYPES, FP_FUSION, launch, on_meta


@triton.jit
def permute_rows_kernel(
    input_ptr,
    index_ptr,
    output_ptr,
    rows,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """output[n, i] = input[n, index[i]]. A row that there is not gives NaN.

    Moves 2N elements, reads 1 and writes 1, and the index.
    """
    tiles = tl.cdiv(rows, block_rows)
    row = tl.program_id(0) % tiles * block_rows + tl.arange(0, block_rows)[:, None]
    in_rows = row < rows
    source = tl.load(index_ptr + row, mask=in_rows, other=0)
    is_there = (source >= 0) & (source < rows)
    # 64-bit before the products: a tensor may have more than 2^31 elements.
    start = (tl.program_id(0) // tiles).to(tl.int64) * rows
    input_ptrs = input_ptr + (start + source) * columns
    output_ptrs = output_ptr + (start + row) * columns
    for first in range(0, columns, block_columns):
        column = first + tl.arange(0, block_columns)[None, :]
        mask = in_rows & (column < columns)
        x = tl.load(input_ptrs + column, mask=mask & is_there, other=float("nan"))
        tl.store(output_ptrs + column, x, mask=mask)


def permute_rows(input: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if (
        input.ndim != 3
        or not index.shape == inverse.shape == input.shape[1:2]
        or not index.dtype == inverse.dtype == torch.int64
        or not index.device == inverse.device == input.device
    ):
        on_meta("permute_rows", (input, index, inverse))
    if input.dtype not in DTYPES:
        raise NotCoveredError
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    if input.numel() == 0:
        return output
    batch, rows, columns = input.shape
    # Four accesses of each of 128 threads. Triton knows of sizes whether 16 divides them.
    elements = 512 * (1 if columns % 16 else 16 // input.itemsize)
    block_columns = min(triton.next_power_of_2(columns), elements)
    block_rows = min(triton.next_power_of_2(rows), elements // block_columns)
    programs = batch * -(-rows // block_rows)
    with torch.cuda.device_of(input):  # does nothing for a CPU tensor (Triton's interpreter)
        launch(
            permute_rows_kernel,
            (programs,),
            input.contiguous(),
            index.contiguous(),
            output,
            rows,
            columns,
            block_rows=block_rows,
            block_columns=block_columns,
            num_warps=4,
            **FP_FUSION,
        )
    return output
