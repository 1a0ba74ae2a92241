"""Counts the FLOPs of a traced program: products and convolutions, two FLOPs per multiply-add."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def count(function: Callable, *args: Any) -> int:
    """Counts the FLOPs of one call of a function that jax can trace; executes nothing."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(times * flops_of(eqn) for eqn, times, _ in equations(jaxpr))


def equations(jaxpr: Any, times: int = 1, stack: str = "") -> Iterator[tuple[Any, int, str]]:
    """Yields (equation, number of executions, name stack) of a jaxpr and all nested ones.

    Of the branches of a `cond` or `switch` the last one is counted; for `platform_dependent` this
    is the default, lax's implementation. The body of a `while` is counted once.
    """
    for eqn in jaxpr.eqns:
        names = f"{stack}/{eqn.source_info.name_stack}"
        yield eqn, times, names
        repeated = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        params = jax.tree.leaves(list(eqn.params.values()))  # branches are a tuple
        nested = [param for param in params if hasattr(param, "eqns")]
        for part in nested[-1:] if eqn.primitive.name == "cond" else nested:
            yield from equations(getattr(part, "jaxpr", part), repeated, names)


def flops_of(eqn: Any) -> int:
    """Returns two per multiply-add of a product or convolution, 0 for all other equations."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution_flops(eqn)
    return 0


def _convolution_flops(eqn: Any) -> int:
    """Returns the FLOPs without products with padding or with the zeros of a dilation.

    A convolution and each of its two gradients then have the same count.
    """
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out, params = eqn.outvars[0].aval.shape, eqn.params
    lhs_dims, rhs_dims, out_dims = params["dimension_numbers"]
    flops = 2 * out[out_dims[0]] * out[out_dims[1]] * rhs[rhs_dims[1]]
    for i in range(len(out) - 2):
        dilation = params["lhs_dilation"][i]
        last = (lhs[lhs_dims[2 + i]] - 1) * dilation
        starts = np.arange(out[out_dims[2 + i]]) * params["window_strides"][i]
        taps = np.arange(rhs[rhs_dims[2 + i]]) * params["rhs_dilation"][i]
        # Input positions of every tap of every output; some lie in padding or between inputs.
        positions = starts[:, None] + taps - params["padding"][i][0]
        is_input = (positions >= 0) & (positions <= last) & (positions % dilation == 0)
        flops *= int(is_input.sum())
    return flops
