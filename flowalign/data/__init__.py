"""Prompts, preference data and latents."""
