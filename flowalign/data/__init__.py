"""Prompts, preference data, and cached latents of images."""
