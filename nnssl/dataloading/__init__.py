"""Labeled and unlabeled streams of patches."""
