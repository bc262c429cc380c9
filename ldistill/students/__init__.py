"""Students: the VLMs that train, each with its own checkpoint format."""
