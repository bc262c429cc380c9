"""What fits where, and what it costs, computed."""
