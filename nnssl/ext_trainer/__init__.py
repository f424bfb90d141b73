"""Folder for ``nnUNet_extTrainer``: makes nnssl's trainers known to nnU-Net's own commands."""

from __future__ import annotations

from pathlib import Path


def shim_folder() -> Path:
    """The folder whose path belongs into the environment variable ``nnUNet_extTrainer``."""
    return Path(__file__).resolve().parent
