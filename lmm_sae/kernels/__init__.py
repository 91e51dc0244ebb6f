"""The four sparse functions, one file per backend. jax only."""
