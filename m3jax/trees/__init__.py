"""The door of the JAX researcher: parameter trees in, a parameter tree out."""
