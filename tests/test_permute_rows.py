"""permute_rows: values, every derivative, bad input."""

import pytest
import torch

import gradnorm_kernels  # noqa: F401 - loads the op

permute_rows = torch.ops.gradnorm_kernels.permute_rows
INDEX = torch.tensor([3, 0, 4, 1, 2])
INVERSE = INDEX.argsort()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_values(dtype):
    x = torch.randn(2, 5, 3).mul(9).to(dtype)
    for view in (x, x.transpose(0, 2).contiguous().transpose(0, 2), x[:0]):
        assert torch.equal(permute_rows(view, INDEX, INVERSE), view[:, INDEX])
        assert torch.equal(permute_rows(permute_rows(view, INDEX, INVERSE), INVERSE, INDEX), view)


def test_derivatives():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def cubed(x):
        return permute_rows(x, INDEX, INVERSE) ** 3

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)
    torch.library.opcheck(permute_rows.default, (x, INDEX, INVERSE))
    hessian = torch.func.hessian(lambda x: cubed(x).sum())(x)
    torch.testing.assert_close(hessian.reshape(30, 30), torch.diag(6 * x.detach().flatten()))


def test_bad_input():
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="input"):
        permute_rows(x[0], INDEX, INVERSE)
    with pytest.raises(TypeError, match="index"):
        permute_rows(x, INDEX.int(), INVERSE)
    with pytest.raises(ValueError, match="inverse"):
        permute_rows(x, INDEX, INVERSE[:4])
    with pytest.raises((IndexError, RuntimeError), match=r"(?i)ind"):
        permute_rows(x, INDEX + 1, INVERSE)
