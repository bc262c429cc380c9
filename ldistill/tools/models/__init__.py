"""`ldistill models`: which families fit, and whether they do with what is installed."""
