"""permute_rows: its table, and values of other dtypes. It has one op, which is its own derivative."""

from dataclasses import dataclass

import pytest
import torch
from contract import OPS, Call, Case, OpContract

INDEX = torch.tensor([3, 0, 4, 1, 2])
INVERSE = INDEX.argsort()


@dataclass(frozen=True)
class PermuteRows(Case):
    name: str
    shape: tuple

    def shapes(self):
        return (self.shape,)

    def fused(self, x):
        return OPS.permute_rows(x, INDEX.to(x.device), INVERSE.to(x.device))

    def stock(self, x):
        return x[:, INDEX.to(x.device)]

    reference = stock

    def calls(self, operands):
        yield Call("permute_rows", (*operands.inputs, INDEX, INVERSE))

    @property
    def large(self):
        return PermuteRows(self.name, (64, 5, 1000))


class TestPermuteRows(OpContract):
    cases = tuple(PermuteRows(f"batch of {n}", (n, 5, 3)) for n in (2, 40, 0))
    traced = ("batch of 2",)
    saves_inputs = False
    test_every_instruction_set = None  # it is PyTorch's index_select
    # Any dtype of the input, and integers are what the others are.
    accepted = (("", "", "integers"), *(("", "input", how) for how in ("complex", "dtype", "sparse")))
    schemas = "permute_rows(Tensor input, Tensor index, Tensor inverse) -> Tensor"

    def check_strides(self, case, operands, results):
        (output,), (first,), (second, _) = results
        assert all(t.is_contiguous() for t in (output, first, second))

    def bad(self):
        x, permute_rows = torch.randn(2, 5, 3), OPS.permute_rows
        yield lambda: permute_rows(x[0], INDEX, INVERSE), ValueError, "input"
        yield lambda: permute_rows(x, INDEX.int(), INVERSE), TypeError, "index"
        yield lambda: permute_rows(x, INDEX, INVERSE[:4]), ValueError, "inverse"
        yield lambda: permute_rows(x, INDEX + 1, INVERSE), (IndexError, RuntimeError), "(?i)ind"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_values_of_any_dtype(dtype):
    x = torch.randn(2, 5, 3).mul(9).to(dtype)
    for view in (x, x.transpose(0, 2).contiguous().transpose(0, 2), x[:0]):
        assert torch.equal(OPS.permute_rows(view, INDEX, INVERSE), view[:, INDEX])
        assert torch.equal(OPS.permute_rows(OPS.permute_rows(view, INDEX, INVERSE), INVERSE, INDEX), view)
