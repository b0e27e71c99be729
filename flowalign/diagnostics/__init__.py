"""Commands that look at a run: check and plan."""
