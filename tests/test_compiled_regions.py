"""Compiled regions: gradients of first and second order as eager's, one compilation for blocks of one structure."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from test_checkpoint import BLOCKS, WIDTH, assert_same, gradients, make_model, ops, step
from torch import nn

import gradnorm_kernels as gk
from gradnorm_kernels import compile as regions

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def compiles_everything():
    """A region that is left as it is would pass every test of values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gradnorm_kernels.compile")
        yield


compile_modules = functools.partial(gk.compile_modules, backend="aot_eager")


@pytest.fixture
def compilations(monkeypatch):
    """The regions that were made."""
    import sys

    module, made = sys.modules["gradnorm_kernels.compile"], []

    class Counted(module._Region):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "_Region", Counted)
    return made


@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_step_without(block, compilations):
    model = make_model(block)
    compiled = compile_modules(copy.deepcopy(model))
    for order in (1, 2):
        assert_same(step(compiled, order), step(model, order), 1e-11)
    assert len(compilations) == 1
