"""One module a stage: reads the workdir, writes the workdir, resumable."""
