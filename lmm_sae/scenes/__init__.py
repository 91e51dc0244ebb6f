"""The embedded default: rendered scenes and two small LLaVA-NeXTs."""
