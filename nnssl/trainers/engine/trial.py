"""Trainers that are tried out and leave nothing behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.request import TrainingRequest, new_trainer


@contextmanager
def trial(request: TrainingRequest, device: torch.device, **environment: str) -> Iterator[SemiSupervisedTrainer]:
    """A trainer as requested, not yet initialized, whose run folder is deleted afterwards.

    Trainers take the folder of results from the environment. ``environment``: further variables to be set meanwhile.
    """
    real = os.environ.get("nnUNet_results", "")
    with tempfile.TemporaryDirectory() as folder:
        values = {"nnUNet_results": folder, "nnUNet_wandb_enabled": "0", **environment}
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            trainer = new_trainer(request, device)
            if trainer.is_cascaded:
                # which is read, not written
                previous = trainer.folder_with_segs_from_previous_stage
                trainer.folder_with_segs_from_previous_stage = previous.replace(folder, real, 1)
            yield trainer
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
