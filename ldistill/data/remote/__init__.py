"""Shards behind a URL: reading, caching, and what to read ahead."""
