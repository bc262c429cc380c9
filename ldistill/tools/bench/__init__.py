"""What a training step costs, and what its data cost."""
