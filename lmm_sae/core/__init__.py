"""What every stage shares: formats, stores and clients. No jax, no torch."""
