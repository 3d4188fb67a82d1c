"""Layers come to a kernel as tuples; a program finds its own by its index."""

import triton
import triton.language as tl


@triton.jit
def layer_at(first, index, L: tl.constexpr):
    """The last layer l with first[l] <= index."""
    value = 0
    for layer in tl.static_range(1, L):
        value = tl.where(index >= first[layer], layer, value)
    return value


@triton.jit
def pick(values, first, index, L: tl.constexpr):
    """values[l] of the last layer l with first[l] <= index."""
    value = values[0]
    for layer in tl.static_range(1, L):
        value = tl.where(index >= first[layer], values[layer], value)
    return value


@triton.jit
def at(values, index, L: tl.constexpr):
    """The element of a tuple at an index known at run time."""
    value = values[0]
    for layer in tl.static_range(1, L):
        value = tl.where(index == layer, values[layer], value)
    return value
