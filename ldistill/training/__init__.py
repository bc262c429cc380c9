"""One run: the Trainer, its metrics, its folder, how it starts, stops and ends."""
