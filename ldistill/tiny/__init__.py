"""The embedded default: a tiny world, a pair that knows it, its shards and its benchmark."""
