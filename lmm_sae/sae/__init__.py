"""The sparse autoencoder: model, data, checkpoints, metrics. jax only."""
