"""Checkpoints: nnU-Net's dictionary for prediction, and one side entry with all that a resumed run needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

import nnssl
from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.inference.network import load_weights
from nnssl.networks.unwrap import unwrap
from nnssl.planners.plans_file import data_differences
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.settings import hyperparameters
from nnssl.utils.files import atomic_path
from nnssl.utils.plain import plain

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

SIDE_ENTRY = "semi_supervised"


def save(trainer: SemiSupervisedTrainer, filename: str | os.PathLike[str], *, resumable: bool = True) -> None:
    """Writes a checkpoint atomically.

    Args:
        trainer: an initialized trainer, between two steps.
        filename: where to.
        resumable: False leaves out what only a resumed training needs (optimizer, student, modules).
    """
    deployed, student = trainer.deployed_network(), unwrap(trainer.network)
    logging = trainer.logger.get_checkpoint()
    side: dict[str, Any] = {
        "version": nnssl.__version__,
        "hyperparameters": trainer.hyperparameter_values(),
        "settings": trainer.settings.as_dict(),
        "iteration": trainer.iteration,
    }
    if resumable:
        side |= {
            "student": None if deployed is student else student.state_dict(),
            "modules": {name: module.state_dict() for name, module in trainer._modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer._optimizers.items()},
            "losses": trainer.meter.state(),
            "history": trainer.history.rows,
        }
    content = {
        "network_weights": deployed.state_dict(),
        "optimizer_state": trainer.optimizer.state_dict() if resumable else None,
        "grad_scaler_state": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
        # an unfinished epoch is logged anew when the training goes on
        "logging": {name: values[: trainer.current_epoch] for name, values in logging.items()},
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        SIDE_ENTRY: side,
    }
    # through a file of Python's, which says why it cannot be written
    with atomic_path(filename) as temporary, open(temporary, "wb") as file:
        torch.save(plain(content), file)


def load(trainer: SemiSupervisedTrainer, source: str | os.PathLike[str] | dict[str, Any]) -> None:
    """Puts a trainer back into the state in which `save` found it; initializes it if necessary.

    Hyper-parameters and run settings are those of the checkpoint, as a run is continued by the rules it began with.

    Raises:
        UserError: if the checkpoint is of another trainer, or holds weights only and the training is not finished.
    """
    content = source if isinstance(source, dict) else read_model_checkpoint(source)
    where = None if isinstance(source, dict) else source
    name = content.get("trainer_name")
    if name != type(trainer).__name__ or SIDE_ENTRY not in content:
        raise UserError(
            "the checkpoint was written by another trainer", where=where, expected=type(trainer).__name__, found=name
        )
    _refuse_other_run(trainer, content["init_args"], where)
    side = content[SIDE_ENTRY]
    if not trainer.was_initialized:
        restored = RunSettings(**side["settings"])
        restored.pretrained_weights = None
        # a recipe that has learned more since does not reach a run that began without it
        trainer.configure(hyperparameters(type(trainer)) | side["hyperparameters"], restored)
        trainer.initialize()
        trainer.settings.pretrained_weights = side["settings"]["pretrained_weights"]
    trainer.current_epoch = content["current_epoch"]
    trainer.iteration = side["iteration"]
    trainer._best_ema = content["_best_ema"]
    trainer.logger.load_checkpoint(content["logging"])
    trainer.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
    if "modules" not in side:
        load_weights(trainer.deployed_network(), content["network_weights"], str(name), where)
        return
    student = content["network_weights"] if side["student"] is None else side["student"]
    load_weights(unwrap(trainer.network), student, str(name), where)
    for module_name, module in trainer._modules.items():
        load_weights(module, side["modules"].get(module_name, {}), f"{name} ({module_name})", where)
    trainer.optimizer.load_state_dict(content["optimizer_state"])
    for optimizer_name, state in side["optimizers"].items():
        trainer._optimizers[optimizer_name].load_state_dict(state)
    if trainer.grad_scaler is not None and content["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(content["grad_scaler_state"])
    trainer.meter.restore({key: values.to(trainer.device) for key, values in side["losses"].items()})
    trainer.history.rows = side["history"]


def _refuse_other_run(trainer: SemiSupervisedTrainer, stored: dict[str, Any], where: object) -> None:
    """``UserError`` unless a checkpoint is of this data set, configuration and fold, with the same patches."""
    plans = PlansManager(stored["plans"])
    configuration = plans.get_configuration(stored["configuration"])
    here = trainer.configuration_manager
    facts = {
        "data set": (plans.dataset_name, trainer.plans_manager.dataset_name),
        "configuration": (stored["configuration"], trainer.configuration_name),
        # the cases of another fold may be those that this one validates on
        "fold": (str(stored["fold"]), str(trainer.fold)),
        "spacing": (list(configuration.spacing), list(here.spacing)),
        "patch_size": (list(configuration.patch_size), list(here.patch_size)),
        "batch_size": (configuration.batch_size, here.batch_size),
    }
    differing = {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    if not differing:
        # without their values, of which some are long
        names = data_differences(stored["plans"], trainer.plans_manager.plans, trainer.configuration_name)
        differing = dict.fromkeys(names, ("of before", "of now"))
    if differing:
        raise UserError(
            "the checkpoint is of another run or plan",
            where=where,
            expected=", ".join(f"{name} {now}" for name, (_, now) in differing.items()),
            found=", ".join(f"{name} {then}" for name, (then, _) in differing.items()),
            fix="put back the plans that the run began with, or train anew with --overwrite",
        )


def load_pretrained(network: nn.Module, filename: str) -> None:
    """Copies all weights but those of the segmentation heads from a checkpoint (nnU-Net's rule).

    Raises:
        UserError: if a weight is missing in the file or has another shape.
    """
    weights = read_model_checkpoint(filename)["network_weights"]
    own = network.state_dict()
    wanted = {key: value for key, value in own.items() if ".seg_layers." not in key}
    unfit = [key for key, value in wanted.items() if key not in weights or weights[key].shape != value.shape]
    if unfit:
        raise UserError(
            "the pretrained weights do not fit the network of this plan",
            where=filename,
            expected=f"{unfit[0]} of shape {tuple(own[unfit[0]].shape)}",
            found=f"{tuple(weights[unfit[0]].shape) if unfit[0] in weights else 'nothing'} ({len(unfit)} such weights)",
            fix="use weights that were trained with the same plan",
        )
    network.load_state_dict(own | {key: weights[key] for key in wanted})
