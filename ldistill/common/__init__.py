"""What every room may use: errors, ranks, samples, pictures, where a checkpoint lies."""
