"""The four sparse functions, one file per backend. jax only.

`ops` is what the rest of the project calls; `reference` says what is meant.
"""
