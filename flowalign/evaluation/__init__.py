"""Evaluation on fixed prompts and noise."""
