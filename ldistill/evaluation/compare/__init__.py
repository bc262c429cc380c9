"""Comparing variants by what lmms-eval wrote of them."""
