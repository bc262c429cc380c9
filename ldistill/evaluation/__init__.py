"""Evaluation: scores of students and bare language models."""
