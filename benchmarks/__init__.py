"""Ours beside its peers on the same work; nothing imports this."""
