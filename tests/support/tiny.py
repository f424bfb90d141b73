"""A preprocessed data set and plan so small that a trainer runs through it in seconds.

The images hold bright blobs on noise, one intensity per class, so that a small network learns them quickly.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.registry import get_trainer
from nnssl.utils.files import write_json

# the contract can be held against another device too, such as cuda
DEVICE = torch.device(os.environ.get("NNSSL_TEST_DEVICE", "cpu"))

# settings for tests over all trainers: what costs more than the tiny network itself
LIGHT: dict[str, dict[str, Any]] = {"C3S3": {"embedding_channels": 4}}

NAME = "Dataset901_Tiny"
PLANS = "tinyPlans"


@dataclass
class Tiny:
    """A tiny data set on disk; `trainer` makes trainers for it."""

    dimensions: int = 3
    channels: int = 1
    classes: int = 2
    regions: bool = False
    ignore: bool = False
    cascade: bool = False
    masked: bool = False
    labeled: int = 2
    unlabeled: int = 3
    labeled_batch: int = 1
    unlabeled_batch: int = 2
    micro_batch: int | None = None
    light: bool = False
    folder: Path = field(default_factory=Path)
    targets: dict[str, Any] = field(default_factory=dict)

    @property
    def configuration(self) -> str:
        if self.cascade:
            return "3d_cascade_fullres"
        return f"{self.dimensions}d" if self.dimensions == 2 else "3d_fullres"

    @property
    def identifier(self) -> str:
        return f"{PLANS}_{'2d' if self.dimensions == 2 else '3d_fullres'}"

    @property
    def patch(self) -> tuple[int, ...]:
        return (16,) * self.dimensions

    def write(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
        """Writes the data set below ``folder`` and points nnU-Net's variables at it."""
        self.folder = folder
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(folder / variable))
            (folder / variable).mkdir(parents=True, exist_ok=True)
        # batches are made in this process: starting workers costs more than the tiny patches
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        base = self.base
        base.mkdir(parents=True)
        write_json(self.dataset_json(), base / "dataset.json")
        write_json(self.plans(), base / f"{PLANS}.json")
        write_json({}, base / "dataset_fingerprint.json")
        cases = [f"labeled_{i}" for i in range(self.labeled)]
        folds = [{"train": [c for c in cases if c != held], "val": [held]} for held in cases]
        write_json(folds if len(cases) > 1 else [], base / "splits_final.json")
        generator = np.random.default_rng(0)
        (base / "gt_segmentations").mkdir()
        for case in cases:
            self._write_labeled(base / self.identifier, case, generator)
        for i in range(self.unlabeled):
            self._write_unlabeled(base / f"{self.identifier}_unlabeled", f"unlabeled_{i}", generator)
        return self

    @property
    def base(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / NAME

    def trainer(self, name: str, fold: int | str = "all", **overrides: Any) -> Any:
        """An initialized trainer in deterministic mode with seed 0, two epochs of two steps unless overridden."""
        budget: dict[str, Any] = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
        trainer = self.bare_trainer(name, fold)
        # the estimate and the pictures take longer than these trainings
        settings = RunSettings(
            seed=0,
            deterministic=True,
            # the same on CPUs with and without bf16
            precision="fp32" if DEVICE.type == "cpu" else "auto",
            micro_batch=self.micro_batch,
            memory_check=False,
            preview_every=0,
        )
        trainer.configure(budget | (LIGHT.get(name, {}) if self.light else {}) | overrides, settings)
        trainer.initialize()
        return trainer

    def bare_trainer(self, name: str, fold: int | str = "all", configuration: str | None = None) -> Any:
        """A trainer that is neither configured nor initialized."""
        plans = json.loads((self.base / f"{PLANS}.json").read_text())
        dataset_json = json.loads((self.base / "dataset.json").read_text())
        trainer = get_trainer(name)(plans, configuration or self.configuration, fold, dataset_json, DEVICE)
        self.targets |= trainer.extra_targets()
        return trainer

    def batch(self, seed: int = 0) -> dict[str, Any]:
        """A training batch with deep supervision targets and pseudo-labels, as the streams deliver it.

        It has the further targets of the trainers made so far.
        """
        generator = torch.Generator().manual_seed(seed)

        def target(patches: int) -> list[torch.Tensor]:
            full = torch.randint(0, self.classes, (patches, 1, *self.patch), generator=generator).to(torch.int16)
            return [full, full[(..., *(slice(None, None, 2),) * self.dimensions)]]

        def images(patches: int) -> torch.Tensor:
            return torch.randn((patches, self.channels, *self.patch), generator=generator)

        labels = target(self.labeled_batch)
        return {
            "target": labels,
            "data": images(self.labeled_batch),
            "keys": ["labeled_0"] * self.labeled_batch,
            "unlabeled": images(self.unlabeled_batch),
            "pseudo_target": target(self.unlabeled_batch),
            "extra": {key: torch.stack([make(patch) for patch in labels[0]]) for key, make in self.targets.items()},
        }

    def dataset_json(self) -> dict[str, Any]:
        labels: dict[str, Any] = {"background": 0} | {f"class_{i}": i for i in range(1, self.classes)}
        extra: dict[str, Any] = {}
        if self.regions:
            labels = {"background": 0, "whole": [1, 2], "core": 2}
            extra["regions_class_order"] = [1, 2]
        if self.ignore:
            labels["ignore"] = max(self.classes, 3 if self.regions else 0)
        return {
            "channel_names": {str(i): "MRI" for i in range(self.channels)},
            "labels": labels,
            "numTraining": self.labeled,
            "file_ending": ".nii.gz",
            **extra,
        }

    def plans(self) -> dict[str, Any]:
        d = self.dimensions
        resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
        configuration = {
            "data_identifier": self.identifier,
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": self.labeled_batch,
            "patch_size": list(self.patch),
            "median_image_size_in_voxels": [20.0] * d,
            "spacing": [1.0] * d,
            "normalization_schemes": ["ZScoreNormalization"] * self.channels,
            "use_mask_for_norm": [self.masked] * self.channels,
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": resampling,
            "resampling_fn_seg_kwargs": resampling | {"is_seg": True},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": resampling,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 3,
                    "features_per_stage": [4, 8, 8],
                    "conv_op": f"torch.nn.modules.conv.Conv{d}d",
                    "kernel_sizes": [[3] * d] * 3,
                    "strides": [[1] * d, [2] * d, [2] * d],
                    "n_conv_per_stage": [1, 1, 1],
                    "n_conv_per_stage_decoder": [1, 1],
                    "conv_bias": True,
                    "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{d}d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
            "batch_dice": d == 2,
            "semi_supervised": {
                "labeled_batch_size": self.labeled_batch,
                "unlabeled_batch_size": self.unlabeled_batch,
            },
        }
        configurations = {f"{d}d" if d == 2 else "3d_fullres": configuration}
        if self.cascade:
            configurations["3d_lowres"] = configuration | {"next_stage": "3d_cascade_fullres"}
            configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        intensity = {"max": 3.0, "mean": 0.0, "median": 0.0, "min": -3.0, "percentile_00_5": -2.0,
                     "percentile_99_5": 2.0, "std": 1.0}  # fmt: skip
        return {
            "dataset_name": NAME,
            "plans_name": PLANS,
            "original_median_spacing_after_transp": [1.0] * 3,
            "original_median_shape_after_transp": [20] * 3,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": configurations,
            "experiment_planner_used": "nnSSLPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(i): intensity for i in range(self.channels)},
            "semi_supervised": {},
        }

    def _volume(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        shape = (20, 20, 20) if self.dimensions == 3 else (1, 20, 20)
        seg = np.zeros(shape, np.int16)
        grid = np.indices(shape)
        for label in range(1, max(self.classes, 3 if self.regions else 0)):
            center = [generator.uniform(6, 14) if n > 1 else 0 for n in shape]
            distance = sum((g - c) ** 2 for g, c in zip(grid, center, strict=True))
            seg[distance < 25] = label
        noise = generator.normal(0, 0.3, (self.channels, *shape))
        return (noise + 1.5 * seg[None]).astype(np.float32), seg[None]

    def _write_labeled(self, folder: Path, case: str, generator: np.random.Generator) -> None:
        import SimpleITK as sitk

        folder.mkdir(exist_ok=True)
        image, seg = self._volume(generator)
        if self.ignore:
            seg[:, :, :3] = self.dataset_json()["labels"]["ignore"]
        labels = range(1, max(self.classes, 3 if self.regions else 0))
        keys: list[Any] = [(1, 2), (2,)] if self.regions else list(labels)
        locations = {key: np.argwhere(np.isin(seg, key)) for key in keys}
        if self.ignore:
            everything = (-1, 0, *labels)
            locations[everything] = np.argwhere(np.isin(seg, everything))
        shape = image.shape[1:]
        properties = {
            "spacing": [1.0, 1.0, 1.0],
            "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())},
            "shape_before_cropping": shape,
            "bbox_used_for_cropping": [[0, n] for n in shape],
            "shape_after_cropping_and_before_resampling": shape,
            "class_locations": locations,
        }
        chunks = {"chunks": image.shape, "blocks": image.shape, "chunks_seg": seg.shape, "blocks_seg": seg.shape}
        nnUNetDatasetBlosc2.save_case(image, seg, properties, str(folder / case), **chunks)
        sitk.WriteImage(sitk.GetImageFromArray(seg[0]), str(self.base / "gt_segmentations" / f"{case}.nii.gz"))

    def _write_unlabeled(self, folder: Path, case: str, generator: np.random.Generator) -> None:
        import blosc2

        folder.mkdir(exist_ok=True)
        image, _ = self._volume(generator)
        blosc2.asarray(image, urlpath=str(folder / f"{case}.b2nd"))
        mask = np.ones((1, *image.shape[1:]), np.int8)
        mask[:, :, :4] = 0
        blosc2.asarray(mask, urlpath=str(folder / f"{case}_mask.b2nd"))


def save_model(trainer: Any) -> Path:
    """Leaves the checkpoint of fold ``all`` and what else the folder of a model holds; returns the folder."""
    folder = Path(trainer.output_folder_base)
    (folder / "fold_all").mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(folder / "fold_all" / "checkpoint_final.pth"))
    write_json(trainer.plans_manager.plans, folder / "plans.json")
    write_json(trainer.dataset_json, folder / "dataset.json")
    return folder
