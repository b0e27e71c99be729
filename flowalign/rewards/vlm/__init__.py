"""Rewards by vision-language models, local or behind a server."""
