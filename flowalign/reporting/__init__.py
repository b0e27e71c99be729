"""Metrics, picture sheets and the report."""
