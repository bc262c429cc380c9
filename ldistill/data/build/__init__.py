"""From people's data to shards: inputs, readers, workers, slices, verification, statistics."""
