"""A run's configuration: sections, loading, cross-checks."""
