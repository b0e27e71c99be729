"""The run folder: checkpoints, adapters, failures."""
