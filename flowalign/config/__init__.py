"""The configuration of a run: its sections, loading, checks, notes, and a schema for editors."""
