"""The `ldistill shards` command: build, merge, verify and describe shards."""
