"""Floating-point operations of a traced function, counted by hand.

A compiler's own count takes the body of a loop once, and attention goes in chunks of queries.
"""

import math

import jax


def count_flops(function, *args) -> int:
    """Operations of the matrix products and convolutions in `function(*args)`, over all devices.

    A multiplication and an addition are two. Loops whose length is not known before they run, such
    as the labelling of components, count once; they hold no products.

    Args:
      function: to be traced, not run.
      args: arrays or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * out * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        # Of a stride's gradient and of a transposed convolution all other inputs are zeros, which
        # nobody multiplies.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * out * math.prod(kernel) // (outputs * zeros)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(_count(inner) for inner in _inner(params))


def _inner(params: dict):
    """The programs within an equation: of a scan, a call, a rematerialised block."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "jaxpr"):  # a closed one
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one
