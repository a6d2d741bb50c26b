"""Settings of the tests of this folder."""

import jax
import pytest


@pytest.fixture(scope='package', autouse=True)
def quick_compilation():
  """LLVM would spend most of the time optimising code that runs once."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
