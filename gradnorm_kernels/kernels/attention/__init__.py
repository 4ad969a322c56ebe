"""Triton kernels of scaled dot-product attention.

Windows, of up to 64 tokens and 64 columns a head, take one kernel a pass: a program holds one window of one
head. Longer sequences, and in half types up to 128 columns, are cut into tiles of scores, which their
backward passes make several times over, in two launches: over blocks of queries, and over blocks of keys.
Neither has scores in memory. What they do not cover takes matrix products, and one kernel over the rows of
scores a pass. The names are those of csrc/attention.cpp, which has the mathematics: S = scale Q K^T + M, P =
softmax(S), dP = dO V^T and so on.

A matrix is (batch 0, batch 1, batch 2, rows, columns), its columns contiguous. Kernels take a matrix, a mask,
or what else has strides, as a tuple of its pointer and its strides, and None for an absent one.
"""

from .launch import _attention_bwd, _attention_bwd_bwd, _attention_fwd
from .rows import _attention_softmax, _attention_softmax_backward, _attention_softmax_double_backward

__all__ = [
    "_attention_bwd",
    "_attention_bwd_bwd",
    "_attention_fwd",
    "_attention_softmax",
    "_attention_softmax_backward",
    "_attention_softmax_double_backward",
]
