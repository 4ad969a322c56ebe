"""PyTorch's switches of TF32, in every way that they can be set."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gradnorm_kernels._tf32 import allow_tf32, has_tf32_convolutions, has_tf32_products

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def switches() -> list[str]:
    return [switch.fp32_precision for switch in (torch.backends, MATMUL, CUDNN, CUDNN.conv, CUDNN.rnn)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = switches()
    MATMUL.allow_tf32 = False
    yield
    torch.backends.fp32_precision = "none"
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
    MATMUL.fp32_precision = "none"
    assert switches() == before


def set_by_product(precision: str) -> None:
    MATMUL.fp32_precision = precision


def set_by_name(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def set_for_all(precision: str) -> None:
    MATMUL.fp32_precision = "none"
    torch.backends.fp32_precision = precision


def set_by_flag(precision: str) -> None:
    MATMUL.allow_tf32 = precision == "tf32"


def set_by_both(precision: str) -> None:
    MATMUL.allow_tf32 = precision != "tf32"
    MATMUL.fp32_precision = precision


SETTERS = [set_by_product, set_by_name, set_for_all, set_by_flag, set_by_both]


@pytest.mark.parametrize("set_to", SETTERS)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products(set_to: Any, precision: str) -> None:
    set_to(precision)
    assert has_tf32_products() == (precision == "tf32")


@pytest.mark.parametrize("set_to", SETTERS)
@pytest.mark.parametrize("allowed", [True, False])
def test_allowed_for_a_block(set_to: Any, allowed: bool) -> None:
    set_to("ieee" if allowed else "tf32")
    before = switches()
    with allow_tf32(allowed):
        assert has_tf32_products() == has_tf32_convolutions() == allowed
        # The old switch can be read, as a model may.
        assert MATMUL.allow_tf32 == CUDNN.allow_tf32 == allowed
    assert switches() == before
    with allow_tf32(None):
        assert switches() == before


def test_convolutions() -> None:
    assert has_tf32_convolutions() == CUDNN.allow_tf32
    CUDNN.conv.fp32_precision = "ieee"
    assert not has_tf32_convolutions()
    with allow_tf32(True):
        assert has_tf32_convolutions()
    assert not has_tf32_convolutions()
