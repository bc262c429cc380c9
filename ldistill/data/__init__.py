"""Data: readers, shards, order, packing and batches.

One direction: sources -> `Sample` -> shards on disk -> order, packs, position -> batch.
Nothing here knows of models; the image and token settings come in through a `Processor`.
"""
