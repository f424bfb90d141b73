"""Pictures of the patches of a training, before it is started or at one of its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nnssl.inference.models import AUTO
from nnssl.pictures.patches import Patch, save_patches
from nnssl.report.recorder import NO_LABEL, Recorder
from nnssl.trainers.engine.auto import with_choice
from nnssl.trainers.engine.preview import class_names, label_map
from nnssl.trainers.engine.request import TrainingRequest, prepare_device
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.trial import trial

_COLUMNS, _MOST_PATCHES = 4, 24
_REGISTERED = 2


def save_preview(
    request: TrainingRequest, folder: str | os.PathLike[str], *, steps: int, checkpoint: str | None = None
) -> list[Path]:
    """Takes some steps of a training and writes a PNG of each kind of patches; nothing else is kept.

    ``stream_labeled.png`` and ``stream_unlabeled.png`` show what the streams deliver, ``input_<network>.png`` what
    enters a network, with the contours of the labels that its predictions are compared with, and ``method.png`` what
    else a method makes of patches, such as reconstructions, if it says so. A method whose first phase trains on labeled
    patches only is shown at the beginning of its main phase.

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
    # batches and networks are made the simple way
    device = prepare_device(request.device)
    limited = any(override.startswith("registered_cases") for override in request.overrides)
    if request.trainer == AUTO:
        request = with_choice(request, device, keep=False)
    if "initial_pseudo_labels=registration" in request.overrides and not limited:
        # all of them may take an hour
        request = replace(request, overrides=[*request.overrides, f"registered_cases={_REGISTERED}"])
    with trial(request, device, nnUNet_n_proc_DA="0", nnUNet_compile="false") as trainer:
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
        check_requirements(trainer)
        if not trainer.was_initialized:
            trainer.initialize()
        recorder = Recorder(trainer)
        kinds = _record(recorder, steps)
    names = class_names(trainer)
    spacing = trainer.configuration_manager.spacing
    files = []
    for kind, patches in kinds.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        # a patch and what was made of it in one row
        columns = 1 + len(recorder.pictures[0][1]) if kind == "method" else _COLUMNS
        shown = patches[: _MOST_PATCHES // columns * columns]
        files.append(save_patches(Path(folder, f"{kind}.png"), shown, names, spacing, title=kind, columns=columns))
    return files


def _record(recorder: Recorder, steps: int) -> dict[str, list[Patch]]:
    trainer = recorder.trainer
    trainer.iteration = max(trainer.iteration, trainer.pretrain_steps)
    trainer.current_epoch = trainer.iteration // trainer.num_iterations_per_epoch
    training, validation = trainer.get_dataloaders()
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
    for step, (images, pictures) in enumerate(recorder.pictures):
        for row, image in enumerate(images[:, 0].numpy()):
            made = [Patch(name, picture[row, 0].numpy(), None) for name, picture in pictures.items()]
            kinds.setdefault("method", []).extend([Patch(f"step {step}, patch {row}", image, None), *made])
    return kinds


def _streams(recorder: Recorder, batch: dict[str, Any]) -> Iterator[tuple[str, list[Patch]]]:
    def labels(target: Any) -> NDArray[Any]:
        return label_map(recorder.trainer, target[0] if isinstance(target, list) else target).numpy()

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
