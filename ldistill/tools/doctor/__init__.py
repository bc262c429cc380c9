"""Is this machine fit to train, and if not, what to do about it."""
