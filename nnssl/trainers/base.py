"""What every semi-supervised trainer shares: one step over labeled and unlabeled patches on nnU-Net's trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from nnssl.dataloading.cases import UnlabeledCases
from nnssl.dataloading.coverage import Coverage
from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases
from nnssl.dataloading.streams import BatchStream
from nnssl.dataloading.targets import TargetFunction
from nnssl.dataset.splits import Fold
from nnssl.errors import UserError
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine import checkpoint, deadline, loop, validation
from nnssl.trainers.engine.distributed import current_ranks
from nnssl.trainers.engine.history import History, LossMeter
from nnssl.trainers.engine.memory_check import check_memory
from nnssl.trainers.engine.micro_batch import check_micro_batch
from nnssl.trainers.engine.pipelines import TrainingStream, open_streams, split_of, unlabeled_images
from nnssl.trainers.engine.precision import Precision
from nnssl.trainers.engine.recipe import apply_recipe, describe_recipe
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.schedule import update_learning_rates
from nnssl.trainers.engine.settings import check_overrides, hyperparameters
from nnssl.trainers.engine.setup import SetUp
from nnssl.trainers.engine.state import seed_step
from nnssl.trainers.engine.step import Step, step_of

Status = Literal["official code", "paper", "re-interpretation", "own"]


class SemiSupervisedTrainer(SetUp):
    """Base of all trainers. A method overrides the fewest hooks that it can:

    - `build_modules`, `build_optimizers`: teachers and other modules beside the student, and who trains them;
    - `extra_targets`: what is computed from the segmentation of labeled patches while they are augmented;
    - `prepare_step`: changes to the patches before the forward pass (mixing);
    - `supervised_loss`, `unsupervised_loss`: named terms, weights included;
    - `pretrain_losses`, `start_main_phase`: what happens before the main phase, and when it begins;
    - `optimize`: only methods whose step is not one loss and one update;
    - `after_step`: EMA updates;
    - `pictures`: what the method makes of a step's patches, to be looked at;
    - `phase_starts`, `start_phase`, `mirrors_between_phases`, `unlabeled_cases`: phases, work on whole cases between;
    - `deployed_network`: the network that predicts and is saved for it (default: the student).

    Hyper-parameters are annotated class attributes; ``--set`` and `configure` override them before `initialize`. Where
    a method speaks of nnU-Net's loss, optimizer and learning rate, those of the run's ``recipe`` are meant.
    """

    source: ClassVar[str] = ""
    year: ClassVar[int] = 0
    status: ClassVar[Status] = "own"
    uses_unlabeled: ClassVar[bool] = True
    min_labeled: ClassVar[int] = 1
    min_unlabeled: ClassVar[int] = 1
    min_labeled_patches: ClassVar[int] = 1
    """Labeled patches per step, of all ranks together, that the method needs."""
    plain_supervision: ClassVar[bool] = True
    """Whether a step without its unsupervised terms is one of Supervised: not where labels train mixed patches only, or
    another network than the student."""
    learns_by_dice: ClassVar[bool] = True
    """Whether labels are learned by nnU-Net's loss, to which the weights of Dice and of rare classes belong."""
    dimensions: ClassVar[tuple[int, ...]] = (2, 3)
    supports_regions: ClassVar[bool] = True
    supports_ignore_label: ClassVar[bool] = True
    supports_cascade: ClassVar[bool] = False
    trained_networks: ClassVar[int] = 1
    deploys_ensemble: ClassVar[bool] = False
    """Whether several networks predict as one unless asked otherwise, which stock nnU-Net cannot build."""
    pretrains_student: ClassVar[bool] = True
    """Whether the student learns before the main phase."""
    restarts_schedule: ClassVar[bool] = False
    """Whether the learning rate starts again with the main phase."""
    memory_factor: ClassVar[float] = 1.0
    """Memory of a step relative to Supervised with as many labeled patches and the planned unlabeled ones."""
    supervised_with: ClassVar[dict[str, Any]] = {}
    """Hyper-parameters with which a step, its unsupervised terms taken away, is the step of Supervised."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    dataloader_train: TrainingStream
    dataloader_val: BatchStream

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    recipe: Literal["auto", "nnunet", "short"] = "auto"
    """Optimizer, its settings and weights in the loss: nnU-Net's, those of short trainings, or by the steps."""
    initial_lr: float = 1e-2
    optimizer_name: Literal["SGD", "AdamW"] = "SGD"
    momentum: float = 0.99
    nesterov: bool = True
    warmup_steps: int = 0
    """Steps over which the learning rate rises, wherever its schedule starts."""
    lr_decay_power: float = 0.9
    """The learning rate falls like the rest of its schedule to this power; 0 keeps it constant."""
    lr_decay_per_step: bool = False
    """Whether it falls with each step; else it stays the same within an epoch, as in nnU-Net."""
    weight_decay: float = 3e-5
    gradient_clipping: float = 12.0
    segmentation_dice_weight: float = 1.0
    """Weight of the Dice in nnU-Net's loss relative to that of its cross entropy; both together weigh 2."""
    rare_class_power: float = 0.0
    """In that cross entropy a voxel weighs its class's share of the labeled voxels to the power of minus this, in
    proportion; 0, nnU-Net's, weighs all alike."""
    oversample_foreground_percent: float = 0.33
    least_class_share: float = 0.05
    """Share of the labeled patches that show each class at least, 0 to below 1; patches on foreground are chosen so."""
    enable_deep_supervision: bool = True
    mirror_axes: tuple[int, ...] | None = None
    """Axes that augmentation and prediction mirror; None takes the decision of the plan (nnU-Net's choice, all, if it
    holds none), () switches mirroring off, which classes need that look alike and are told apart by their place."""
    rotation_degrees: float | None = None
    """Largest angle of a rotation in augmentation; None takes nnU-Net's, 30 in 3D and 180 within a plane."""
    labeled_batch_size: int | None = None
    unlabeled_batch_size: int | None = None
    """Patches per step, of all ranks together; None takes the number of the plan."""
    atlas_augmentation: Literal["none", "regional_switch"] = "none"
    """What is done with pairs of labeled cases: nothing, or boxes are exchanged at corresponding positions."""
    atlas_correspondence: Literal["relative", "bbox", "registration"] | None = None
    """Where positions of two labeled cases correspond; None takes the decision of the plan."""
    switch_probability: float = 0.5
    """Of a pair to be switched, by 1 to 3 boxes (``switch_boxes``) with edges of a quarter to half of the patch."""
    switch_boxes: tuple[int, ...] = (1, 3)
    switch_edges: tuple[float, ...] = (0.25, 0.5)
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
        self.deadline: deadline.Deadline | None = None
        self.meter = LossMeter()
        self.history = History()
        self._modules: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._split: Fold | None = None
        self.coverage: Coverage | None = None

    def configure(self, overrides: dict[str, Any] | None = None, settings: RunSettings | None = None) -> None:
        """Sets hyper-parameters and run settings; only before `initialize`.

        Raises:
            UserError: for unknown names or values of a wrong type.
        """
        if self.was_initialized:
            raise RuntimeError("configure must be called before initialize")
        chosen = check_overrides(type(self), overrides or {})
        for name, value in chosen.items():
            setattr(self, name, value)
        apply_recipe(self, chosen)
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
    def planned_steps(self) -> int:
        """Steps by which the phases are planned; where the length was changed since, the last phase has others."""
        return (self.settings.planned_epochs or self.num_epochs) * self.num_iterations_per_epoch

    @property
    def pretrain_steps(self) -> int:
        """Steps before the main phase; both phases have at least one if there are two."""
        total = self.planned_steps
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
    def check_settings(self) -> None:
        """Raises ``UserError`` for hyper-parameters that the method cannot be trained with; before the first step."""

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

    def extra_targets(self) -> dict[str, TargetFunction]:
        """Further targets of labeled patches, by name: functions of the segmentation ``(C, *P)`` that each is given.

        They are computed where patches are augmented (so they must be picklable); ``step.extra`` has them by name.
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

    def pictures(self, step: Step) -> dict[str, torch.Tensor]:
        """What the method made of the patches of a finished step ``(N, C, *P)``, by name, for ``nnssl_preview``."""
        return {}

    @property
    def phase_starts(self) -> tuple[int, ...]:
        """Steps before which `start_phase` is called; streams are opened anew there."""
        return ()

    @property
    def mirrors_between_phases(self) -> bool:
        """Whether predictions between phases average over mirrored inputs, as later ones do."""
        return True

    @property
    def schedule_starts(self) -> tuple[int, ...]:
        """Steps at which learning rates start again: those of `phase_starts`."""
        return self.phase_starts

    def start_phase(self, stopping: Callable[[], bool]) -> bool:
        """Work between two phases, such as predicting whole cases; a checkpoint was saved just before it.

        False if it ended early, which every rank must return alike, because ``stopping`` was true on one. It is called
        again when the training is continued, and should find what it had finished.
        """
        return True

    def unlabeled_cases(self) -> UnlabeledCases | PseudoLabeledCases | None:
        """What the unlabeled patches are drawn from at the present step; None for no unlabeled patches."""
        return unlabeled_images(self) if self.uses_unlabeled else None

    def deployed_network(self) -> nn.Module:
        """The network that predicts, without wrappers."""
        return unwrap(self.network)

    # ------------------------------------------------------------------ the step

    def train_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One forward pass over labeled and unlabeled patches, one update.

        Args:
            batch: ``data`` ``(B_l, C, *P)``, ``target`` (one tensor, or one per head), ``unlabeled``
                ``(B_u, C, *P)`` or None, ``extra`` the method's further targets if it has any.

        Returns:
            Every named loss and their sum as ``loss``, detached and still on the device.
        """
        seed_step(self.seed, self.iteration, self.device)
        if self.iteration == self.pretrain_steps > 0:
            self.start_main_phase()
            update_learning_rates(self)
        elif self.warmup_steps > 0 or self.lr_decay_per_step:
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
        return step_of(batch, self.device, self.iteration, self.progress)

    def forward(self, step: Step) -> None:
        """Fills ``step.heads`` with the student's float32 logits for labeled and unlabeled patches in one pass."""
        step.heads = self.heads(self.network, step.images)

    def backward_and_update(self, loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Backward pass, clipping and step of each of ``optimizers`` (default: the student's)."""
        optimizers = optimizers or (self.optimizer,)
        self.backward(loss, *optimizers)
        self.update(*optimizers)

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
        self.print_to_log_file(describe_recipe(self))
        if self.ranks.is_main:
            super().on_train_start()
        else:  # without what nnU-Net writes
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
            self.set_deep_supervision_enabled(self.enable_deep_supervision)

    def run_training(self, begin: loop.Begin = lambda: lambda: None) -> None:
        loop.train(self, begin)

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
