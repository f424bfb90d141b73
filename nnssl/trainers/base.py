"""What every semi-supervised trainer shares: one step over labeled and unlabeled patches on nnU-Net's trainer."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnssl.dataloading.streams import BatchStream
from nnssl.dataset.splits import Fold
from nnssl.errors import UserError
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import set_deep_supervision, unwrap
from nnssl.trainers.engine import checkpoint, loop, validation
from nnssl.trainers.engine.blocks import BuildingBlocks
from nnssl.trainers.engine.distributed import current_ranks, synchronize_batch_norms
from nnssl.trainers.engine.history import History, LossMeter
from nnssl.trainers.engine.memory_check import check_memory
from nnssl.trainers.engine.memory_format import check_memory_format, choose_memory_format
from nnssl.trainers.engine.micro_batch import check_micro_batch
from nnssl.trainers.engine.modules import attach_modules
from nnssl.trainers.engine.pipelines import TrainingStream, open_streams, split_of
from nnssl.trainers.engine.precision import Precision, choose_precision
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.schedule import update_learning_rates
from nnssl.trainers.engine.settings import check_overrides, hyperparameters
from nnssl.trainers.engine.shared_loss import share_loss
from nnssl.trainers.engine.state import make_deterministic, seed_everything, seed_step
from nnssl.trainers.engine.step import Step


class SemiSupervisedTrainer(BuildingBlocks):
    """Base of all trainers. A method overrides the fewest hooks that it can:

    - `build_modules`, `build_optimizers`: teachers and other modules beside the student, and who trains them;
    - `prepare_step`: changes to the patches before the forward pass (mixing);
    - `supervised_loss`, `unsupervised_loss`: named terms, weights included;
    - `pretrain_losses`, `start_main_phase`: what happens before the main phase, and when it begins;
    - `optimize`: only methods whose step is not one loss and one update;
    - `after_step`: EMA updates;
    - `deployed_network`: the network that is saved for prediction (default: the student).

    Hyper-parameters are annotated class attributes; ``--set`` and `configure` override them before `initialize`.
    """

    source: ClassVar[str] = ""
    year: ClassVar[int] = 0
    status: ClassVar[Literal["official code", "paper", "re-interpretation", "own"]] = "own"
    uses_unlabeled: ClassVar[bool] = True
    min_labeled: ClassVar[int] = 1
    min_unlabeled: ClassVar[int] = 1
    dimensions: ClassVar[tuple[int, ...]] = (2, 3)
    supports_regions: ClassVar[bool] = True
    supports_ignore_label: ClassVar[bool] = True
    supports_cascade: ClassVar[bool] = False
    trained_networks: ClassVar[int] = 1
    restarts_schedule: ClassVar[bool] = False
    """Whether the learning rate starts again with the main phase."""
    memory_factor: ClassVar[float] = 1.0
    """Memory of a step relative to Supervised with as many labeled patches and the planned unlabeled ones."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    dataloader_train: TrainingStream
    dataloader_val: BatchStream

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    initial_lr: float = 1e-2
    optimizer_name: Literal["SGD", "AdamW"] = "SGD"
    """SGD with momentum 0.99 as in nnU-Net, or AdamW, which needs far fewer steps (initial_lr=2e-3,
    weight_decay=0.01)."""
    weight_decay: float = 3e-5
    gradient_clipping: float = 12.0
    oversample_foreground_percent: float = 0.33
    enable_deep_supervision: bool = True
    mirror_axes: tuple[int, ...] | None = None
    """Axes that augmentation and prediction mirror; None takes the decision of the plan (nnU-Net's choice, all, if it
    holds none), () switches mirroring off, which classes need that look alike and are told apart by their place."""
    labeled_batch_size: int | None = None
    """Labeled patches per step, of all ranks together; None takes the number of the plan."""
    unlabeled_batch_size: int | None = None
    """Unlabeled patches per step, of all ranks together; None takes the number of the plan."""
    pretrain_share: float = 0.0
    """Share of the steps, 0 to below 1, that come before the method's main phase and train on labeled patches only."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature, which it inspects)
    ):
        plans.setdefault("continue_training", False)
        if torch.distributed.is_initialized():
            # nnU-Net's constructor would take the rank for a CUDA device of one machine
            raise UserError(
                f"{type(self).__name__} cannot be trained in processes that others have connected",
                fix="start with nnssl_train -num_gpus N, or with torchrun ... -m nnssl train",
            )
        self.ranks = current_ranks()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if device.index is not None:
            self.device = device
        self.local_rank = self.ranks.rank  # nnU-Net's name for it
        for name, value in hyperparameters(type(self)).items():
            setattr(self, name, value)
        self.settings = RunSettings()
        self.precision = Precision("fp32", self.device.type)
        self.memory_format = torch.contiguous_format
        self.iteration = 0
        self.meter = LossMeter()
        self.history = History()
        self._modules: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._split: Fold | None = None

    def configure(self, overrides: dict[str, Any] | None = None, settings: RunSettings | None = None) -> None:
        """Sets hyper-parameters and run settings; only before `initialize`.

        Raises:
            UserError: for unknown names or values of a wrong type.
        """
        if self.was_initialized:
            raise RuntimeError("configure must be called before initialize")
        for name, value in check_overrides(type(self), overrides or {}).items():
            setattr(self, name, value)
        if settings is not None:
            self.settings = settings

    def hyperparameter_values(self) -> dict[str, Any]:
        """Hyper-parameters as they are set in this run."""
        return {name: getattr(self, name) for name in hyperparameters(type(self))}

    @property
    def seed(self) -> int:
        """Seed of this run; known once the trainer is initialized."""
        if self.settings.seed is None:
            raise RuntimeError("the seed is drawn by initialize")
        return self.settings.seed

    @property
    def num_unlabeled(self) -> int:
        """Unlabeled patches per step on this rank; 0 if the method uses none."""
        if not self.uses_unlabeled:
            return 0
        patches = self.unlabeled_batch_size
        if patches is None:
            planned = self.configuration_manager.configuration.get("semi_supervised", {})
            patches = planned.get("unlabeled_batch_size", self.configuration_manager.batch_size)
        return self.ranks.even_share(patches, "unlabeled")

    @property
    def pretrain_steps(self) -> int:
        """Steps before the main phase; both phases have at least one if there are two."""
        total = self.num_epochs * self.num_iterations_per_epoch
        return min(max(1, round(self.pretrain_share * total)), total - 1) if self.pretrain_share > 0 else 0

    @property
    def pretraining(self) -> bool:
        """Whether the next step comes before the main phase."""
        return self.iteration < self.pretrain_steps

    @property
    def progress(self) -> float:
        """Share of the steps of the main phase that are done, 0 to 1; 0 before it."""
        steps = self.num_epochs * self.num_iterations_per_epoch - self.pretrain_steps
        return max(0, self.iteration - self.pretrain_steps) / steps

    # ------------------------------------------------------------------ hooks of the methods

    def build_modules(self) -> dict[str, nn.Module]:
        """Modules beside the student, by name. They become attributes, are moved to the device and saved.

        Parameters that require gradients are trained by the optimizer of the student, unless `build_optimizers` takes
        them. The student is built and holds its initial weights: ``unwrap(self.network)``.
        """
        return {}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers beside that of the student, by name, for parameters of modules. They are saved.

        Their learning rates follow that of the student in proportion, except in groups with ``"scheduled": False``.
        """
        return {}

    def prepare_step(self, step: Step) -> None:
        """Changes the patches before the forward pass, for methods that mix them."""

    def supervised_loss(self, step: Step) -> torch.Tensor:
        """nnU-Net's loss (Dice and cross entropy, deep supervision) on the labeled patches."""
        return self.segmentation_loss(step.labeled_heads, step.target)

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        """Named terms that are added to the supervised loss, each with its weight."""
        return {}

    def pretrain_losses(self, step: Step) -> dict[str, torch.Tensor]:
        """Named terms of a step before the main phase; by default the supervised loss, without unlabeled patches."""
        step.unlabeled = step.unlabeled[:0]
        self.forward(step)
        return {"supervised": self.supervised_loss(step)}

    def start_main_phase(self) -> None:
        """Called once before the first step of the main phase if others came before; teachers copy the student."""
        for module in self._modules.values():
            if isinstance(module, EMATeacher):
                module.update(unwrap(self.network), 0.0)

    def after_step(self, step: Step) -> None:
        """Called after each optimizer step."""

    def deployed_network(self) -> nn.Module:
        """The network that predicts, without wrappers."""
        return unwrap(self.network)

    # ------------------------------------------------------------------ the step

    def train_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One forward pass over labeled and unlabeled patches, one update.

        Args:
            batch: ``data`` ``(B_l, C, *P)``, ``target`` (one tensor, or one per head), ``unlabeled``
                ``(B_u, C, *P)`` or None.

        Returns:
            Every named loss and their sum as ``loss``, detached and still on the device.
        """
        seed_step(self.seed, self.iteration, self.device)
        if self.iteration == self.pretrain_steps > 0:
            self.start_main_phase()
            update_learning_rates(self)
        step = self.make_step(batch)
        self.prepare_step(step)
        losses = self.optimize(step)
        self.iteration += 1
        self.after_step(step)
        return {name: loss.detach() for name, loss in losses.items()}

    def optimize(self, step: Step) -> dict[str, torch.Tensor]:
        """Losses, backward pass and update of one step; returns the named losses and their sum as ``loss``."""
        for optimizer in (self.optimizer, *self._optimizers.values()):
            optimizer.zero_grad(set_to_none=True)
        if self.pretraining:
            losses = self.pretrain_losses(step)
        else:
            self.forward(step)
            losses = {"supervised": self.supervised_loss(step), **self.unsupervised_loss(step)}
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        self.backward_and_update(total)
        return {"loss": total, **losses}

    def make_step(self, batch: dict[str, Any]) -> Step:
        """Moves a batch to the device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, non_blocking=True)

        target = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        labeled, unlabeled = move(batch["data"]), batch.get("unlabeled")
        return Step(
            labeled=labeled,
            target=[move(t) for t in target],
            unlabeled=labeled[:0] if unlabeled is None else move(unlabeled),
            iteration=self.iteration,
            progress=self.progress,
        )

    def forward(self, step: Step) -> None:
        """Fills ``step.heads`` with the student's float32 logits for labeled and unlabeled patches in one pass."""
        images = torch.cat([step.labeled, step.unlabeled]) if len(step.unlabeled) else step.labeled
        step.heads = self.heads(self.network, images)

    def backward_and_update(self, loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Backward pass; then for each of ``optimizers`` (default: the student's) mean over ranks, clipping, step."""
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        for optimizer in optimizers or (self.optimizer,):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.ranks.average_gradients(parameters)
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    # ------------------------------------------------------------------ set-up

    def initialize(self) -> None:
        """Builds network, optimizer, loss and the modules of the method, seeded, on the device, alike on all ranks."""
        self.ranks.connect(self.device)
        if self.settings.seed is None:
            self.settings.seed = self.ranks.from_main(lambda: int.from_bytes(os.urandom(4), "little"))
        planned_axes = self.configuration_manager.configuration.get("semi_supervised", {}).get("mirror_axes")
        if self.mirror_axes is None and planned_axes is not None:
            # kept like a hyper-parameter, so that a continued training mirrors alike if it is planned anew meanwhile
            self.mirror_axes = tuple(planned_axes)
        if self.settings.deterministic:
            make_deterministic()
        elif self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        check_memory_format(self.settings.memory_format)
        self.precision = choose_precision(self.device, self.settings.precision)
        seed_everything(self.settings.seed)
        super().initialize()
        self.network = synchronize_batch_norms(self.network, self.ranks, self.device)
        self.grad_scaler = self.precision.grad_scaler()
        if self.settings.pretrained_weights is not None:
            checkpoint.load_pretrained(unwrap(self.network), self.settings.pretrained_weights)
        choose_memory_format(self)
        attach_modules(self)
        self.ranks.copy_from_main([self.network, *self._modules.values()])

    def _set_batch_size_and_oversample(self) -> None:
        patches = self.labeled_batch_size
        if patches is None:
            patches = self.configuration_manager.batch_size
        self.batch_size = self.ranks.even_share(patches, "labeled")

    def _build_loss(self) -> nn.Module:
        return share_loss(super()._build_loss(), self.ranks, self.label_manager.ignore_label)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = self.new_optimizer(self.network.parameters())
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, tuple[int, ...]]:
        """nnU-Net's geometry of augmentation, with `mirror_axes` where they are set."""
        rotation, dummy_2d, initial_patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.mirror_axes is not None:
            axes = self.mirror_axes
            # nnU-Net's predictor takes None for 'no mirroring' and fails on an empty tuple
            self.inference_allowed_mirroring_axes = axes or None
        return rotation, dummy_2d, initial_patch_size, axes

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        set_deep_supervision(self.network, enabled)

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        if self.ranks.is_main:
            super().print_to_log_file(*args, **kwargs)

    def print_plans(self) -> None:
        """Writes the plan to the log file; on the console it would bury everything else."""
        self.print_to_log_file(self.configuration_manager, also_print_to_console=False)

    def plot_network_architecture(self) -> None:
        """Nothing: nnU-Net's plot needs a library that no longer works."""

    # ------------------------------------------------------------------ data

    def split(self) -> Fold:
        """Training, validation and unlabeled cases of this fold."""
        if self._split is None:
            self._split = split_of(self)
        return self._split

    def do_split(self) -> tuple[list[str], list[str]]:
        split = self.split()
        return split.train, split.val

    def get_dataloaders(self) -> tuple[TrainingStream, BatchStream]:
        return open_streams(self)

    # ------------------------------------------------------------------ training, checkpoints, validation

    def on_train_start(self) -> None:
        check_requirements(self)
        if not self.was_initialized:
            self.initialize()
        check_micro_batch(self)
        check_memory(self)
        if self.ranks.is_main:
            super().on_train_start()
        else:  # without what nnU-Net writes
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
            self.set_deep_supervision_enabled(self.enable_deep_supervision)

    def run_training(self) -> None:
        loop.train(self)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's online evaluation of the network that will be deployed, in this run's precision."""
        heads = validation.FloatHeads(self)
        network, self.network = self.network, heads
        try:
            return super().validation_step(batch)
        finally:
            self.network = network

    def save_checkpoint(self, filename: str) -> None:
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
        elif self.local_rank == 0:
            checkpoint.save(self, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        checkpoint.load(self, filename_or_checkpoint)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        validation.validate(self, save_probabilities)
