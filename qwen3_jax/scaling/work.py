"""Matrix FLOPs that a program executes, counted from its jaxpr: loops by their length.

What is recomputed in the backward pass (`jax.checkpoint`) is in the jaxpr, and so is counted; XLA
does no product that is not there. A loop whose length no array's shape tells (`while`) counts once.
"""
import math

import jax


def count_flops(fn, *args):
  """Matrix FLOPs of fn(*args), over all devices; arguments may be shapes."""
  return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def of_jaxpr(jaxpr):
  return sum(of_equation(equation) for equation in jaxpr.eqns)


def of_equation(equation):
  """FLOPs of one equation and all that it calls."""
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _product(equation)
  if name in ('ragged_dot', 'ragged_dot_general'):
    rows = equation.invars[0].aval.shape
    return 2 * math.prod(rows) * equation.outvars[0].aval.shape[-1]
  if name == 'pallas_call':
    return _kernel(params)
  if name == 'shard_map':
    return math.prod(params['mesh'].shape.values()) * of_jaxpr(_jaxpr(params['jaxpr']))
  inner = [of_jaxpr(each) for each in _inner(params)]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'cond':
    return max(inner, default=0)
  return sum(inner)


def _product(equation):
  (contract, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _kernel(params):
  """A Pallas kernel's own estimate; without one, its body on every step of its grid."""
  if params.get('cost_estimate') is not None:
    return params['cost_estimate'].flops
  grid = [side for side in params['grid_mapping'].grid if isinstance(side, int)]
  return math.prod(grid) * of_jaxpr(_jaxpr(params['jaxpr']))


def _inner(params):
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(each, 'eqns') or hasattr(getattr(each, 'jaxpr', None), 'eqns'):
        yield _jaxpr(each)


def _jaxpr(value):
  return value if hasattr(value, 'eqns') else value.jaxpr
