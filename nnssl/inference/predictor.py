"""nnU-Net's predictor with nnssl's look-up of trainers, safe loading and the number format of the device."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.inference.models import FINAL_CHECKPOINT, TrainedModel, open_model
from nnssl.inference.network import build_network, load_weights, managers, require_own_plan
from nnssl.inference.uncertainty import further_networks
from nnssl.networks.ensemble import Ensemble
from nnssl.networks.memory_format import layout_named, layout_of, set_memory_format
from nnssl.networks.unwrap import unwrap
from nnssl.planners.plans_file import refuse_foreign_code
from nnssl.trainers.engine.memory_format import check_memory_format
from nnssl.trainers.engine.precision import Precision, choose_precision
from nnssl.trainers.registry import get_trainer


class Predictor(nnUNetPredictor):
    """Sliding-window prediction; what is not said here is nnU-Net's.

    - Trainers are looked up in nnssl's registry first, without importing all of nnU-Net's.
    - Checkpoints are read without running code that they hold.
    - bf16 on CPUs that compute it in hardware; fp16 on CUDA and fp32 elsewhere, as in nnU-Net.
    - On the CPU all threads of torch are used (nnU-Net stops at 8), and in fp32 the tensors are channels-last
      and two mirrored copies make a pass.
    - No mirroring may be written as an empty tuple as well as ``None``.

    Args:
        tile_step_size: distance of neighboring windows as a fraction of the patch size, in (0, 1].
        use_gaussian: weight the center of a window more than its margin.
        use_mirroring: average over mirrored inputs, on the axes that the training allowed.
        perform_everything_on_device: keep the results on the GPU; without effect on other devices.
        device: where the network runs.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        memory_format: ``contiguous``, ``channels_last``, or ``auto``: channels-last in fp32 on the CPU, where it is
            faster. Contiguous gives nnU-Net's results to the bit, channels-last to rounding. For networks that are
            loaded from checkpoints; one that is passed to `manual_initialization` keeps its layout.
        trust_checkpoint: allow checkpoints to run code.
        verbose, verbose_preprocessing: nnU-Net's messages.
        allow_tqdm: progress bar over the windows of a case.
    """

    network: nn.Module
    list_of_parameters: list[dict]

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's default; devices are immutable)
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        precision: str = "auto",
        memory_format: str = "auto",
        trust_checkpoint: bool = False,
    ):
        self.precision: Precision = choose_precision(device, precision)
        check_memory_format(memory_format)
        self.memory_format = _choose_memory_format(memory_format, self.precision)
        self._further_weights: list[dict] = []
        self.trust_checkpoint = trust_checkpoint
        self._cpu_threads = torch.get_num_threads()
        if not 0 < tile_step_size <= 1:
            raise UserError("the step size must be above 0 and at most 1", found=tile_step_size)
        # nnU-Net prints a remark about perform_everything_on_device on every device but CUDA, whatever was asked for
        with redirect_stdout(io.StringIO()):
            super().__init__(
                tile_step_size,
                use_gaussian,
                use_mirroring,
                perform_everything_on_device and device.type == "cuda",
                device,
                verbose,
                verbose_preprocessing,
                allow_tqdm,
            )
        if torch.are_deterministic_algorithms_enabled():
            torch.backends.cudnn.benchmark = False  # which nnU-Net's predictor switches on

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str | os.PathLike[str],
        use_folds: Iterable[str | int] | str | int | None,
        checkpoint_name: str = FINAL_CHECKPOINT,
    ) -> None:
        """As nnU-Net's; ``use_folds=None`` takes all finished folds (see `nnssl.inference.models.open_model`)."""
        folds = [use_folds] if isinstance(use_folds, (str, int)) else use_folds
        self.initialize_from_model(open_model(model_training_output_dir, folds=folds, checkpoint=checkpoint_name))

    def initialize_from_model(self, model: TrainedModel, *, keep_further: bool = False) -> None:
        """Loads the networks of all folds of ``model``, whose outputs are averaged.

        ``keep_further`` keeps the other networks of a single fold's checkpoint for `predict_members`.

        Raises:
            UserError: if a checkpoint cannot be read safely, the folds were trained differently, or the weights do
                not fit the network that the trainer builds.
        """
        weights, settings, further = [], [], []
        for file in model.checkpoint_files():
            checkpoint = read_model_checkpoint(file, trust=self.trust_checkpoint)
            # the tensors are mapped from the file, which a running training may write again
            weights.append({name: tensor.clone() for name, tensor in checkpoint["network_weights"].items()})
            if len(model.folds) == 1 and keep_further:
                further = further_networks(checkpoint)
            axes = tuple(checkpoint.get("inference_allowed_mirroring_axes") or ())
            configuration = checkpoint["init_args"]["configuration"]
            require_own_plan(checkpoint, model.plans, file)
            settings.append((checkpoint["trainer_name"], configuration, axes))
        if len(set(settings)) > 1:
            raise UserError(
                "the folds were trained differently and cannot be averaged",
                where=model.folder,
                expected="the same trainer, configuration and mirroring axes",
                found="; ".join(f"fold {fold}: {s}" for fold, s in zip(model.folds, settings, strict=True)),
                fix="choose folds that belong together with -f",
            )
        trainer_name, configuration, mirroring_axes = settings[0]
        plans_manager, configuration_manager = managers(model.plans, configuration, model.folder)
        if not self.trust_checkpoint:
            refuse_foreign_code(plans_manager.plans, configuration, model.folder / "plans.json")
        dataset_json = model.dataset_json
        trainer = get_trainer(trainer_name)
        network = build_network(trainer, plans_manager, configuration_manager, dataset_json, weights[0])
        set_memory_format(network, layout_named(self.memory_format, len(configuration_manager.patch_size)))
        for fold_weights, file in zip(reversed(weights), reversed(model.checkpoint_files()), strict=True):
            load_weights(network, fold_weights, trainer_name, file)
        self.manual_initialization(
            network, plans_manager, configuration_manager, weights, dataset_json, trainer_name, mirroring_axes
        )
        self._further_weights = further

    def manual_initialization(
        self,
        network: nn.Module,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        parameters: list[dict] | None,
        dataset_json: dict,
        trainer_name: str,
        inference_allowed_mirroring_axes: tuple[int, ...] | None,
    ) -> None:
        """As nnU-Net's; an empty tuple of axes means no mirroring."""
        super().manual_initialization(
            network,
            plans_manager,
            configuration_manager,
            parameters,
            dataset_json,
            trainer_name,
            inference_allowed_mirroring_axes or None,
        )

    def predict_members(self, data: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What `predict_logits_from_preprocessed_data` returns, and the logits of each member behind it.

        Members (see `nnssl.inference.uncertainty`) are the folds; of a single fold the members of its ensemble, or its
        network and the further ones that were kept.
        """
        folds, network = list(self.list_of_parameters), self.network
        try:
            outputs = [self._logits_with(weights, data) for weights in folds]
            if len(folds) > 1:
                # as nnU-Net averages, to the bit
                return sum(outputs[1:], outputs[0].clone()) / len(folds), outputs
            ensemble = unwrap(network)
            if isinstance(ensemble, Ensemble):
                return outputs[0], [self._logits_of(member, data) for member in ensemble.members.values()]
            return outputs[0], outputs + [self._logits_with(weights, data) for weights in self._further_weights]
        finally:
            self.list_of_parameters, self.network = folds, network

    def _logits_of(self, network: nn.Module, data: torch.Tensor) -> torch.Tensor:
        self.network = network
        return self._logits_with(network.state_dict(), data)

    def _logits_with(self, weights: dict, data: torch.Tensor) -> torch.Tensor:
        self.list_of_parameters = [weights]
        return self.predict_logits_from_preprocessed_data(data)

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Logits (K, X, Y, Z) in half precision for a preprocessed image (C, X, Y, Z).

        bf16 outputs of the network become fp32 before mirrored and overlapping windows are summed: bf16 has 8
        significant bits, too few for a sum of many terms.
        """
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(self._cpu_threads)
        hooks = [self.network.register_forward_pre_hook(_in_layout)]
        if self.precision.name == "bf16":
            hooks.append(self.network.register_forward_hook(_as_float32))
        try:
            with self.precision.autocast():
                return super().predict_sliding_window_return_logits(input_image)
        finally:
            torch.set_num_threads(threads)
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        # nnU-Net switches autocast on for every CUDA prediction
        if self.device.type == "cuda" and self.precision.name == "fp32":
            with torch.autocast("cuda", enabled=False):
                return super()._internal_maybe_mirror_and_predict(x)
        if self.device.type == "cpu" and layout_of(self.network) != torch.contiguous_format:
            return self._predict_pairs(x)
        return super()._internal_maybe_mirror_and_predict(x)

    def _predict_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """The same mean over mirrored copies, two copies in a pass.

        For single patches torch takes convolution kernels that unfold the patch, unless it is large; from two patches
        on it takes those of oneDNN, which are several times faster. So a patch without mirrored copies is doubled.
        """
        axes = [axis + 2 for axis in (self.allowed_mirroring_axes or () if self.use_mirroring else ())]
        flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]
        total: torch.Tensor | int = 0
        for pair in (flips[i : i + 2] for i in range(0, len(flips), 2)):
            copies = [x.flip(flip) for flip in pair]
            outputs = self.network(torch.cat(copies * 2 if len(copies) == 1 else copies)).split(len(x))
            for flip, output in zip(pair, outputs, strict=False):
                total = total + output.flip(flip)
        return total / len(flips)  # type: ignore[return-value]


def _choose_memory_format(requested: str, precision: Precision) -> str:
    if requested == "auto":
        return "channels_last" if (precision.device_type, precision.name) == ("cpu", "fp32") else "contiguous"
    return requested


def _in_layout(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].contiguous(memory_format=layout_of(module)), *inputs[1:])


def _as_float32(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
