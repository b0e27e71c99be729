"""Pictures of a model, or of an adapter before and after training."""
