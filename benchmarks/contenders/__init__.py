"""One file a contender: start(job, variant) -> Contender. See `worker`."""
