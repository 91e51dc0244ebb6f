"""Every Torch model: the subject, its SAE edits, the judges, the server."""
