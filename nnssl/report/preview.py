"""Pictures of the patches of a training, before it is started or at one of its checkpoints."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnssl.report.overlay import class_colors, draw_contours, fullest_slice
from nnssl.report.recorder import NO_LABEL, Recorder
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.run import TrainingRequest, new_trainer, prepare_device
from nnssl.utils.files import atomic_path

_COLUMNS = 4
_MOST_PATCHES = 24
_INCHES = 2.6


@dataclass(frozen=True)
class Patch:
    """An image ``(*P)`` (the first channel), labels ``(*P)`` or None, and what is written above it."""

    title: str
    image: NDArray[Any]
    labels: NDArray[Any] | None


def save_preview(
    request: TrainingRequest, folder: str | os.PathLike[str], *, steps: int, checkpoint: str | None = None
) -> list[Path]:
    """Takes some steps of a training and writes a PNG of each kind of patches; nothing else is kept.

    ``stream_labeled.png`` and ``stream_unlabeled.png`` show what the streams deliver, ``input_<network>.png`` what
    enters a network, with the contours of the labels that its predictions are compared with. A method whose first
    phase trains on labeled patches only is shown at the beginning of its main phase.

    Args:
        request: as for a training.
        folder: for the pictures; made if it is not there.
        steps: to take.
        checkpoint: of such a training, whose step, settings and weights are used.

    Returns:
        The files.

    Raises:
        UserError: the training could not be started.
    """
    with _without_traces():
        trainer = new_trainer(request, prepare_device(request.device))
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
        check_requirements(trainer)
        if not trainer.was_initialized:
            trainer.initialize()
        kinds = _record(trainer, steps)
    names = _class_names(trainer)
    spacing = trainer.configuration_manager.spacing
    files = []
    for kind, patches in kinds.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        files.append(save_patches(Path(folder, f"{kind}.png"), patches[:_MOST_PATCHES], names, spacing, title=kind))
    return files


def save_patches(
    path: Path, patches: Sequence[Patch], class_names: Mapping[int, str], spacing: Sequence[float], *, title: str = ""
) -> Path:
    """Writes a PNG of patches side by side, contours of their labels in the colors of the classes.

    A patch in 3D is shown in the slice, across the axis of the largest spacing, that has the most labels.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = -(-len(patches) // _COLUMNS)
    figure = Figure(figsize=(_INCHES * _COLUMNS, (_INCHES + 0.3) * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    colors = class_colors(class_names)
    for ax in axes.flat:
        ax.set_axis_off()
    for patch, ax in zip(patches, axes.flat, strict=False):
        image, labels, aspect = _slice(patch, spacing)
        low, high = np.percentile(image, (1, 99))
        ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        if labels is not None:
            draw_contours(ax, labels, colors, linestyles="solid", linewidths=1.2)
        ax.set_title(patch.title, fontsize="small")
    lines = [Line2D([], [], color=colors[value], label=name) for value, name in class_names.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=_COLUMNS, fontsize="small")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path


def _record(trainer: SemiSupervisedTrainer, steps: int) -> dict[str, list[Patch]]:
    trainer.iteration = max(trainer.iteration, trainer.pretrain_steps)
    trainer.current_epoch = trainer.iteration // trainer.num_iterations_per_epoch
    training, validation = trainer.get_dataloaders()
    recorder = Recorder(trainer)
    kinds: dict[str, list[Patch]] = {}
    trainer.network.train()
    try:
        with recorder.watching():
            for recorder.step in range(steps):
                batch = next(training)
                for kind, patches in _streams(recorder, batch):
                    kinds.setdefault(kind, []).extend(patches)
                trainer.train_step(batch)
    finally:
        training.close()
        validation.close()
    for seen in recorder.passes:
        labeled = [labels if (labels != NO_LABEL).any() else None for labels in seen.labels.numpy()]
        kinds.setdefault(f"input_{seen.network}", []).extend(
            Patch(f"step {seen.step}, patch {row}", image, labels)
            for row, (image, labels) in enumerate(zip(seen.images[:, 0].numpy(), labeled, strict=True))
        )
    return kinds


def _streams(recorder: Recorder, batch: dict[str, Any]) -> Iterator[tuple[str, list[Patch]]]:
    def labels(target: Any) -> NDArray[Any]:
        return recorder.label_map(target[0] if isinstance(target, list) else target).numpy()

    images = batch["data"][:, 0].numpy()
    yield "stream_labeled", [Patch(*row) for row in zip(batch["keys"], images, labels(batch["target"]), strict=True)]
    if batch.get("unlabeled") is None:
        return
    images, target = batch["unlabeled"][:, 0].numpy(), batch.get("pseudo_target")
    pseudo = [None] * len(images) if target is None else labels(target)
    yield (
        "stream_unlabeled",
        [Patch(f"step {recorder.step}, patch {row}", images[row], pseudo[row]) for row in range(len(images))],
    )


def _slice(patch: Patch, spacing: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any] | None, float]:
    """Image and labels in 2D, and height of a pixel divided by its width."""
    image, labels, spacing = patch.image, patch.labels, list(spacing)
    if image.ndim == 3:
        axis = int(np.argmax(spacing))
        index = image.shape[axis] // 2
        if labels is not None and (labels > 0).any():
            index = fullest_slice(labels.clip(0), axis)
        image, labels = image.take(index, axis), None if labels is None else labels.take(index, axis)
        del spacing[axis]
    return image, labels, spacing[-2] / spacing[-1]


def _class_names(trainer: SemiSupervisedTrainer) -> dict[int, str]:
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if name != "ignore"}
    manager = trainer.label_manager
    if not manager.has_regions:
        return {value: name for name, value in labels.items() if value != 0}
    regions = {tuple(value) if isinstance(value, list) else (value,): name for name, value in labels.items()}
    wanted = [tuple(r) if isinstance(r, (list, tuple)) else (r,) for r in manager.foreground_regions]
    return {number: regions[region] for number, region in enumerate(wanted, 1)}


@contextmanager
def _without_traces() -> Iterator[None]:
    """While inside, runs are written to a folder that is deleted, and batches and networks are made the simple way.

    Trainers take the folder of results from the environment.
    """
    names = ("nnUNet_results", "nnUNet_n_proc_DA", "nnUNet_compile")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(zip(names, (folder, "0", "false"), strict=True))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
