"""Experiment planners for labeled and unlabeled cases together."""
