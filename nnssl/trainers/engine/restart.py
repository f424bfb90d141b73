"""A training that begins anew inside a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.state import seed_everything

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def new_student(trainer: SemiSupervisedTrainer, number: int) -> None:
    """Gives the student new initial weights, which depend on the seed of the run and ``number`` only.

    Pretrained weights are loaded again where the run began with some. The network stays the same object, so that
    wrappers, memory format and the optimizer's parameters stay valid.
    """
    seed_everything(int(np.random.SeedSequence((trainer.seed, number)).generate_state(1)[0]))
    student = unwrap(trainer.network)
    student.load_state_dict(unwrap(trainer.new_pretrained_network()).state_dict())
    trainer.ranks.copy_from_main([student])


def forget_past_steps(trainer: SemiSupervisedTrainer) -> None:
    """Empties what optimizers and loss scaler remember of past steps, such as momentum.

    The best checkpoint is chosen anew too, so that in the end it is one of the last training.
    """
    for optimizer in (trainer.optimizer, *trainer._optimizers.values()):
        optimizer.state.clear()
    trainer.grad_scaler = trainer.precision.grad_scaler()
    trainer._best_ema = None
