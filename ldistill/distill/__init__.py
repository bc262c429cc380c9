"""The method: shared keys and values, the teacher that reads them, the objective."""
