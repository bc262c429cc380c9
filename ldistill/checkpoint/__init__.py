"""Checkpoints: complete or invisible, saved and resumed by all ranks together."""
