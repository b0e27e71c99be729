"""Align text-to-image flow models (SD3, SD3.5, Flux) with rewards and preferences."""

__version__ = "0.1.0"
