"""Fingerprint of labeled and unlabeled cases, and preprocessing of both."""
