"""Trained models of tiny networks with random weights, and scans for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.inference.network import build_network, managers
from nnssl.utils.files import write_json
from tests.support.tiny import Tiny

DATASET = "Dataset901_Tiny"


def write_model(
    results: Path,
    tiny: Tiny | None = None,
    *,
    trainer: str = "nnUNetTrainer",
    plans_name: str = "nnSSLPlans",
    configuration: str | None = None,
    folds: Sequence[int | str] = (0,),
    checkpoint: str = "checkpoint_final.pth",
    mirroring: tuple[int, ...] | None = (0,),
    plans: dict[str, Any] | None = None,
) -> Path:
    """Writes a model folder as nnU-Net does, NumPy numbers in the log included; returns the folder."""
    tiny = tiny or Tiny()
    configuration = configuration or tiny.configuration
    plans = plans or tiny.plans()
    plans["plans_name"] = plans_name
    if configuration not in plans["configurations"]:
        plans["configurations"][configuration] = next(iter(plans["configurations"].values()))
    dataset_json = tiny.dataset_json()
    folder = results / DATASET / f"{trainer}__{plans_name}__{configuration}"
    write_json(plans, folder / "plans.json")
    write_json(dataset_json, folder / "dataset.json")
    write_json({"spacings": [[1.0, 1.0, 1.0]]}, folder / "dataset_fingerprint.json")
    plans_manager, configuration_manager = managers(plans, configuration, folder)
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        network = build_network(nnUNetTrainer, plans_manager, configuration_manager, dataset_json)
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(
            {
                "network_weights": network.state_dict(),
                "optimizer_state": torch.optim.SGD(network.parameters(), 0.1).state_dict(),
                "grad_scaler_state": None,
                "logging": {"ema_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.5)]]},
                "_best_ema": np.float64(0.5),
                "current_epoch": 1,
                "init_args": {
                    "plans": plans,
                    "configuration": configuration,
                    "fold": fold,
                    "dataset_json": dataset_json,
                    "device": torch.device("cpu"),
                },
                "trainer_name": trainer,
                "inference_allowed_mirroring_axes": mirroring,
            },
            folder / f"fold_{fold}" / checkpoint,
        )
    return folder


def change_checkpoint(folder: Path, fold: int | str = 0, **entries: Any) -> None:
    """Replaces entries of a checkpoint."""
    file = folder / f"fold_{fold}" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    torch.save(content | entries, file)


def write_scan(
    file: Path, seed: int = 0, shape: Sequence[int] = (20, 16, 14), spacing: Sequence[float] = (1.0, 1.0, 0.9)
) -> Path:
    """Writes noise with a bright block; ``shape`` in array order, ``spacing`` in SimpleITK's."""
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array[tuple(slice(n // 3, 2 * n // 3) for n in shape)] += 3
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(list(spacing)[: len(shape)])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def read_mask(file: Path) -> np.ndarray:
    """Mask as an array, in SimpleITK's order of axes."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
