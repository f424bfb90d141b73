"""Trained models as stock nnU-Net wants them: no nnssl is needed to predict with what is written here."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.inference.models import FINAL_CHECKPOINT, TrainedModel
from nnssl.inference.network import build_network, load_weights, managers, require_own_plan
from nnssl.networks.ensemble import member_numbers
from nnssl.planners.plans_file import refuse_foreign_code
from nnssl.trainers.registry import get_trainer
from nnssl.utils.files import read_json, write_json

STOCK_TRAINER = "nnUNetTrainer"

# all else may name cases, patients and folders of whoever trained the model ("dataset", "training", "provenance")
_NEEDED = ("channel_names", "modality", "labels", "regions_class_order", "file_ending", "overwrite_image_reader_writer")
_CREDITS = ("name", "description", "reference", "citation", "release", "license", "licence", "converted_by")
_DATASET = (*_NEEDED, "numTraining", *_CREDITS)
_FINGERPRINT = (
    "spacings",
    "shapes_after_crop",
    "median_relative_size_after_cropping",
    "foreground_intensity_properties_per_channel",
)


def export_model(
    model: TrainedModel, output: str | os.PathLike[str], *, as_zip: bool = False, trust_checkpoint: bool = False
) -> Path:
    """Writes ``model`` for stock nnU-Net: plans, data set description, fingerprint and weights, trainer nnUNetTrainer.

    A folder serves ``nnUNetv2_predict_from_modelfolder -m``; a zip file is installed with
    ``nnUNetv2_install_pretrained_model_from_zip`` and serves ``nnUNetv2_predict``. Optimizer, log and everything else
    that only training needs stay out, and so do the names and files of the training cases.

    Args:
        model: the model and its folds.
        output: folder to make, or zip file.
        as_zip: write a zip file.
        trust_checkpoint: allow the checkpoints to run code.

    Returns:
        The folder or file.

    Raises:
        UserError: if ``output`` exists, or stock nnU-Net cannot predict with the model (another network than the
            planned one, or preprocessing that nnU-Net does not have).
    """
    output = Path(output)
    if output.exists() and (output.is_file() or as_zip or any(output.iterdir())):
        raise UserError("the target exists already", found=output, fix="choose another name with -o, or remove it")
    if as_zip and output.suffix != ".zip":
        raise UserError("the name of a zip file must end with .zip", found=output.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".tmp_export_", dir=output.parent))
    try:
        _write_folder(model, scratch / "model", trust_checkpoint)
        if as_zip:
            plans = model.plans
            configuration = _configuration(scratch / "model", model)
            inside = f"{plans['dataset_name']}/{STOCK_TRAINER}__{plans['plans_name']}__{configuration}"
            _zip(scratch / "model", scratch / output.name, inside)
            os.replace(scratch / output.name, output)
        else:
            # on Windows a folder cannot be renamed onto an empty one
            if output.is_dir():
                output.rmdir()
            os.rename(scratch / "model", output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output


def _write_folder(model: TrainedModel, folder: Path, trust_checkpoint: bool) -> None:
    plans, dataset_json = model.plans, model.dataset_json
    folder.mkdir()
    for fold, file in zip(model.folds, model.checkpoint_files(), strict=True):
        checkpoint = read_model_checkpoint(file, trust=trust_checkpoint)
        configuration = checkpoint["init_args"]["configuration"]
        plans_manager, configuration_manager = managers(plans, configuration, model.folder)
        require_own_plan(checkpoint, plans, file)
        if not trust_checkpoint:
            refuse_foreign_code(plans, configuration, model.folder / "plans.json")
        check_stock_can_predict(checkpoint, plans_manager, configuration_manager, dataset_json, where=file)
        (folder / f"fold_{fold}").mkdir()
        torch.save(_stock_checkpoint(checkpoint), folder / f"fold_{fold}" / FINAL_CHECKPOINT)
    write_json(plans, folder / "plans.json")
    write_json(_only(_DATASET, dataset_json), folder / "dataset.json")
    fingerprint = model.folder / "dataset_fingerprint.json"
    if fingerprint.is_file():
        write_json(_only(_FINGERPRINT, read_json(fingerprint)), folder / fingerprint.name)


def _only(entries: Sequence[str], content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name in entries}


def check_stock_can_predict(
    checkpoint: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    *,
    where: object,
) -> None:
    """Raises ``UserError`` unless the checkpoint's network is the one that stock nnU-Net builds from the plans.

    Names and shapes of the weights must agree, and, for any trainer but nnUNetTrainer, also the output for a random
    input: a trainer may change a network without changing its weights.
    """
    name, weights = checkpoint["trainer_name"], checkpoint["network_weights"]
    advice = (
        "predict with nnssl_predict, or with stock nnU-Net where nnssl is installed: "
        "export nnUNet_extTrainer=$(nnssl_export --shim)"
    )
    if configuration_manager.preprocessor_class is None:
        raise UserError(
            "stock nnU-Net lacks the preprocessor of the plans",
            where=where,
            found=configuration_manager.preprocessor_name,
            fix=advice,
        )
    members = member_numbers(weights)
    if members:
        what = (
            f"averages {len(members)} networks"
            if len(members) > 1
            else "uses another architecture than the planned one"
        )
        raise UserError(
            f"the model of {name} {what}, which stock nnU-Net cannot do",
            where=where,
            fix="predict with nnssl_predict, or train a model that deploys one network",
        )
    stock = build_network(nnUNetTrainer, plans_manager, configuration_manager, dataset_json)
    theirs = {key: tuple(value.shape) for key, value in stock.state_dict().items()}
    ours = {key: tuple(value.shape) for key, value in weights.items()}
    if theirs != ours:
        raise UserError(
            f"the model of {name} has another network than the planned one, so stock nnU-Net cannot use it",
            where=where,
            expected=f"{len(theirs)} weights of {configuration_manager.network_arch_class_name.rpartition('.')[2]}",
            found=_difference(theirs, ours),
            fix=advice,
        )
    if name == STOCK_TRAINER:
        return
    own = build_network(get_trainer(name), plans_manager, configuration_manager, dataset_json)
    for network in (stock, own):
        load_weights(network, weights, name, where)
    channels = determine_num_input_channels(plans_manager, configuration_manager, dataset_json)
    if not _same_output(stock, own, channels, configuration_manager):
        raise UserError(
            f"the network of {name} has the planned weights but computes something else with them",
            where=where,
            fix=advice,
        )


def _stock_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    arguments = checkpoint["init_args"]
    return {
        "network_weights": {key: value.clone() for key, value in checkpoint["network_weights"].items()},
        "trainer_name": STOCK_TRAINER,
        "init_args": {key: arguments[key] for key in ("configuration", "fold") if key in arguments},
        # stock nnU-Net crashes on an empty tuple
        "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes") or None,
    }


def _difference(expected: dict[str, tuple], found: dict[str, tuple]) -> str:
    additional = sorted(found.keys() - expected.keys())
    missing = sorted(expected.keys() - found.keys())
    reshaped = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    groups = (("additional", additional), ("missing", missing), ("of another shape", reshaped))
    return "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in groups if keys)


@torch.inference_mode()
def _same_output(a: nn.Module, b: nn.Module, channels: int, configuration_manager: ConfigurationManager) -> bool:
    # two voxels per axis at the bottleneck: the smallest input on which instance norm does not vanish
    size = 2 * np.prod(np.vstack(configuration_manager.pool_op_kernel_sizes), axis=0)
    x = torch.randn(1, channels, *size.tolist(), generator=torch.Generator().manual_seed(0))
    return torch.equal(a.eval()(x), b.eval()(x))


def _configuration(folder: Path, model: TrainedModel) -> str:
    file = folder / f"fold_{model.folds[0]}" / FINAL_CHECKPOINT
    return read_model_checkpoint(file)["init_args"]["configuration"]


def _zip(folder: Path, file: Path, inside: str) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{inside}/{path.relative_to(folder).as_posix()}")
