"""Work of a program, counted in its trace: products and convolutions, two FLOPs a multiply-add."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def count(function: Callable, *given: Any) -> int:
    """FLOPs of one call of a function that jax can trace; nothing runs."""
    jaxpr = jax.make_jaxpr(function)(*given).jaxpr
    return sum(times * flops_of(eqn) for eqn, times, _ in equations(jaxpr))


def equations(jaxpr: Any, times: int = 1, stack: str = "") -> Iterator[tuple[Any, int, str]]:
    """(equation, how often it runs, its names from outside in) of a jaxpr and all inside it.

    Of the branches of a `cond` or `switch` the last one counts: of `platform_dependent` that is
    the default, lax's own. The body of a `while` counts once.
    """
    for eqn in jaxpr.eqns:
        inside = f"{stack}/{eqn.source_info.name_stack}"
        yield eqn, times, inside
        repeated = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        parts = jax.tree.leaves(list(eqn.params.values()))  # branches are a tuple
        found = [part for part in parts if hasattr(part, "eqns")]
        for part in found[-1:] if eqn.primitive.name == "cond" else found:
            yield from equations(getattr(part, "jaxpr", part), repeated, inside)


def flops_of(eqn: Any) -> int:
    """Two for every multiply-add of a product or convolution; 0 for everything else."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution_flops(eqn)
    return 0


def _convolution_flops(eqn: Any) -> int:
    """Products with padding or with the zeros of a dilation are left out.

    So a convolution and each of its two gradients count the same.
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
        # Where every tap of every output lies; before the first input, after the last, or between?
        places = starts[:, None] + taps - params["padding"][i][0]
        flops *= int(((places >= 0) & (places <= last) & (places % dilation == 0)).sum())
    return flops
