"""Arithmetic with one meaning on every backend: floats, random bits, counts and sums that do not depend on order."""

SCHEME = "m3jax-2"
"""How bits are made, as manifests name it: a change of what any merge gives is a new scheme."""

SCHEMES = ("m3jax-1", SCHEME)
"""Those that can be replayed. In m3jax-1 every tensor was a parameter of its own, keyed by its stored name."""
