"""Arithmetic with one meaning on every backend: floats, random bits, counts and sums that do not depend on order."""
