"""What every semi-supervised trainer shares: one step over labeled and unlabeled patches on nnU-Net's trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl.dataloading.cases import unlabeled_folder, unlabeled_identifiers
from nnssl.dataloading.streams import BatchStream
from nnssl.dataset.splits import Fold, load_fold
from nnssl.errors import UserError
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import set_deep_supervision, unwrap
from nnssl.trainers.engine import checkpoint, loop, validation
from nnssl.trainers.engine.distributed import current_ranks, synchronize_batch_norms
from nnssl.trainers.engine.history import History, LossMeter
from nnssl.trainers.engine.memory_format import check_memory_format, choose_memory_format
from nnssl.trainers.engine.pipelines import TrainingStream, open_streams
from nnssl.trainers.engine.precision import Precision, choose_precision
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.settings import check_overrides, hyperparameters
from nnssl.trainers.engine.shared_loss import share_loss
from nnssl.trainers.engine.state import make_deterministic, seed_everything, seed_step
from nnssl.trainers.engine.step import Step


class SemiSupervisedTrainer(nnUNetTrainer):
    """Base of all trainers. A method overrides the fewest hooks that it can:

    - `build_modules`: teachers and other modules beside the student;
    - `prepare_step`: changes to the patches before the forward pass (mixing);
    - `supervised_loss`, `unsupervised_loss`: named terms, weights included;
    - `backward_and_update`: only methods that manipulate gradients;
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
    """Axes that augmentation and prediction mirror; None takes nnU-Net's choice (all), () switches mirroring off,
    which classes need that look alike and are told apart by their place."""
    labeled_batch_size: int | None = None
    """Labeled patches per step, of all ranks together; None takes the number of the plan."""
    unlabeled_batch_size: int | None = None
    """Unlabeled patches per step, of all ranks together; None takes the number of the plan."""

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
    def progress(self) -> float:
        """Share of the training steps that are done, 0 to 1."""
        return self.iteration / (self.num_epochs * self.num_iterations_per_epoch)

    # ------------------------------------------------------------------ hooks of the methods

    def build_modules(self) -> dict[str, nn.Module]:
        """Modules beside the student, by name. They become attributes, are moved to the device and saved.

        Parameters that require gradients are trained by the optimizer of the student. The student is built and holds
        its initial weights: ``unwrap(self.network)``.
        """
        return {}

    def prepare_step(self, step: Step) -> None:
        """Changes the patches before the forward pass, for methods that mix them."""

    def supervised_loss(self, step: Step) -> torch.Tensor:
        """nnU-Net's loss (Dice and cross entropy, deep supervision) on the labeled patches."""
        if self.enable_deep_supervision:
            return self.loss(step.labeled_heads, step.target)
        return self.loss(step.labeled_logits, step.target[0])

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        """Named terms that are added to the supervised loss, each with its weight."""
        return {}

    def after_step(self, step: Step) -> None:
        """Called after each optimizer step."""

    def deployed_network(self) -> nn.Module:
        """The network that predicts, without wrappers."""
        return unwrap(self.network)

    # ------------------------------------------------------------------ building blocks for methods

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over classes, or sigmoid where labels are overlapping regions; shape is kept."""
        return logits.sigmoid() if self.label_manager.has_regions else logits.softmax(1)

    def heads(self, network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """Float32 logits of ``network`` in this run's precision, full resolution first."""
        with self.precision.autocast():
            output = network(images.contiguous(memory_format=self.memory_format))
        return [head.float() for head in (output if isinstance(output, (list, tuple)) else [output])]

    def randn_like(self, patches: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of the shape ``(B, ...)`` of patches, the same for any number of ranks."""
        shape = (len(patches) * self.ranks.size, *patches.shape[1:])
        return self.ranks.own_rows(torch.randn(shape, dtype=patches.dtype, device=patches.device))

    def new_teacher(self) -> EMATeacher:
        """Copy of the student that follows it by averaging and predicts at full resolution only."""
        teacher = EMATeacher(unwrap(self.network))
        set_deep_supervision(teacher.network, False)
        if self._do_i_compile():
            teacher.network.compile()
        return teacher

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
        step = self.make_step(batch)
        self.prepare_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.forward(step)
        losses = {"supervised": self.supervised_loss(step), **self.unsupervised_loss(step)}
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else losses["supervised"]
        self.backward_and_update(total)
        self.iteration += 1
        self.after_step(step)
        return {name: loss.detach() for name, loss in (("loss", total), *losses.items())}

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

    def backward_and_update(self, loss: torch.Tensor) -> None:
        """Backward pass, mean of the gradients over the ranks, gradient clipping and optimizer step."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.grad_scaler is None:
            loss.backward()
            self.ranks.average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self.ranks.average_gradients(parameters)
        self.grad_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    # ------------------------------------------------------------------ set-up

    def initialize(self) -> None:
        """Builds network, optimizer, loss and the modules of the method, seeded, on the device, alike on all ranks."""
        self.ranks.connect(self.device)
        if self.settings.seed is None:
            self.settings.seed = self.ranks.from_main(lambda: int.from_bytes(os.urandom(4), "little"))
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
        self._modules = {
            name: synchronize_batch_norms(module.to(self.device), self.ranks, self.device)
            for name, module in self.build_modules().items()
        }
        for name, module in self._modules.items():
            setattr(self, name, module)
            trained = [p for p in module.parameters() if p.requires_grad]
            if trained:
                self.optimizer.add_param_group({"params": trained})
        self.ranks.copy_from_main([self.network, *self._modules.values()])

    def _set_batch_size_and_oversample(self) -> None:
        patches = self.labeled_batch_size
        if patches is None:
            patches = self.configuration_manager.batch_size
        self.batch_size = self.ranks.even_share(patches, "labeled")

    def _build_loss(self) -> nn.Module:
        return share_loss(super()._build_loss(), self.ranks, self.label_manager.ignore_label)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        if self.optimizer_name == "SGD":
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
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
            folder = self.preprocessed_dataset_folder
            if folder is None or not Path(folder).is_dir():
                raise UserError(
                    f"configuration {self.configuration_name} is not preprocessed",
                    where=folder,
                    fix=f"nnssl_plan_and_preprocess -d {self.plans_manager.dataset_name} -c {self.configuration_name}",
                )
            from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

            labeled = infer_dataset_class(folder).get_identifiers(folder)
            unlabeled = unlabeled_identifiers(unlabeled_folder(folder))
            splits_file = Path(nnUNet_preprocessed, self.plans_manager.dataset_name, "splits_final.json")
            self._split = load_fold(splits_file, self.fold, sorted(labeled), unlabeled)
        return self._split

    def do_split(self) -> tuple[list[str], list[str]]:
        split = self.split()
        return split.train, split.val

    def get_dataloaders(self) -> tuple[TrainingStream, BatchStream]:
        return open_streams(self)

    # ------------------------------------------------------------------ training, checkpoints, validation

    def on_train_start(self) -> None:
        check_requirements(self)
        if self.ranks.is_main:
            super().on_train_start()
        else:  # without what nnU-Net writes
            if not self.was_initialized:
                self.initialize()
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
