"""From prompts to scored rollouts and batches."""
