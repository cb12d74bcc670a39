"""Programs compiled as users compile them, with all optimisations, of which other tests have none (tests/conftest)."""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
"""`jax.jit` at XLA's own level, at which products are contracted into sums where nothing stops that."""
