"""Vision-language models as rewards."""
