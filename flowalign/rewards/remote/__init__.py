"""Rewards behind HTTP: the client and the server."""
