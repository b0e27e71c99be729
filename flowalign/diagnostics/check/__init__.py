"""Checks of a run on its own model before it trains: `flowalign check`."""

from flowalign.diagnostics.check.report import check

__all__ = ["check"]
