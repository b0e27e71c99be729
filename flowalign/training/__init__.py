"""The training loop, and what prepares and ends it."""
