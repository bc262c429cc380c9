"""Students and their LMs: models, checkpoints, processors, fit, shapes and FLOPs."""
