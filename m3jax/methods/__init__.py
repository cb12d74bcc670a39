"""Merge methods and sparsifiers: one file and one row of the catalogue each."""
