"""The training loop: epochs, checkpoints, logs, and endings that lose nothing."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm import tqdm

from nnssl.errors import UserError
from nnssl.trainers.engine import checkpoint
from nnssl.trainers.engine.deadline import keep_deadline
from nnssl.trainers.engine.device_errors import device_errors
from nnssl.trainers.engine.history import not_finite
from nnssl.trainers.engine.pipelines import worker_counts
from nnssl.trainers.engine.preview import class_names, preview_is_due, save_preview_of_epoch
from nnssl.trainers.engine.schedule import update_learning_rates
from nnssl.trainers.engine.stopping import StopRequest

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

SAVE_EVERY_EPOCHS = 10
SAVE_EVERY_SECONDS = 300.0
PLOT_EVERY_SECONDS = 60.0
STOP_FILE = "stop"
LEAST_SCALE = 1e-6
"""Of a loss in fp16, which begins with 65536 and is halved by each step whose gradients are not finite."""
STARVING_SHARE = 0.1

# what a rank wishes before the next step; the largest wish of all ranks is done by all
GO_ON, SAVE, STOP = range(3)

Begin = Callable[[], Callable[[], None]]

LATEST, FINAL, BEST = "checkpoint_latest.pth", "checkpoint_final.pth", "checkpoint_best.pth"


def train(trainer: SemiSupervisedTrainer, begin: Begin = lambda: lambda: None) -> None:
    """Trains from where ``trainer`` stands to its last epoch.

    ``begin`` is called before the first step, what it returns after it: nothing speaks against the training any more,
    and nothing has been saved.

    A stop request (SIGTERM, Ctrl-C, or a file ``stop`` in the run folder) saves ``checkpoint_latest.pth`` after the
    current step and ends the process with exit code 0. Several ranks stop together, whichever was asked to, one step
    later. Only the main rank watches for the file, writes and reports.

    Raises:
        UserError: if a loss is not finite, a worker process died, or the device lacks memory or deterministic kernels.
    """
    with device_errors(trainer):
        trainer.on_train_start()
    folder = Path(trainer.output_folder)
    stop_file = folder / STOP_FILE if trainer.ranks.is_main else None
    try:
        if trainer.ranks.is_main:
            for leftover in folder.rglob(".tmp_*"):
                leftover.unlink()
        with StopRequest(stop_file) as stop, _progress_bar(trainer) as bar, device_errors(trainer):
            clock = _Clock(begin())
            while trainer.current_epoch < trainer.num_epochs:
                _run_epoch(trainer, stop, bar, clock)
        _finish(trainer)
    finally:
        trainer.dataloader_train.close()
        trainer.dataloader_val.close()


class _Clock:
    """When the last checkpoint, plot and preview were made, and what has happened once."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self.saved = self.plotted = self.pictured = time.monotonic()
        self.has_warned = self.has_begun = False
        self._begun = begun

    def begin(self) -> None:
        """Calls ``begun``, unless it was called."""
        if not self.has_begun:
            self.has_begun = True
            self._begun()


def _progress_bar(trainer: SemiSupervisedTrainer) -> tqdm:
    total = trainer.num_epochs * trainer.num_iterations_per_epoch
    # disable=None: shown on a terminal, silent in log files, where one line per epoch is printed instead
    hidden = None if trainer.ranks.is_main else True
    return tqdm(total=total, initial=trainer.iteration, unit="step", disable=hidden, dynamic_ncols=True, smoothing=0.05)


def _run_epoch(trainer: SemiSupervisedTrainer, stop: StopRequest, bar: tqdm, clock: _Clock) -> None:
    epoch = trainer.current_epoch
    _open_epoch(trainer)
    began, steps, batch = time.monotonic(), 0, None
    trainer.dataloader_train.restart_clock()
    while trainer.iteration < (epoch + 1) * trainer.num_iterations_per_epoch:
        _save_or_stop(trainer, stop, clock)
        if trainer.iteration in trainer.phase_starts:
            began += _start_phase(trainer, stop, clock)
        elif trainer.iteration == trainer.pretrain_steps > 0 and trainer.pretrains_student:
            _warn_of_unlearned(trainer)
        batch = None  # not to be kept while the next one is waited for
        batch = next(trainer.dataloader_train)
        trainer.meter.add(trainer.train_step(batch))
        clock.begin()
        steps += 1
        bar.update()
    trainer.meter.average(trainer.ranks.mean)
    losses = _epoch_losses(trainer)
    seconds, waited = time.monotonic() - began, sum(trainer.dataloader_train.waited.values())
    timing = {"step_seconds": seconds / max(steps, 1), "data_wait": waited / max(steps, 1)}
    _save_or_stop(trainer, stop, clock)
    _validate_online(trainer)
    _close_epoch(trainer, losses, timing, bar)
    _warn_of_starving(trainer, timing, clock)
    planned = trainer.num_epochs
    if keep_deadline(trainer):
        bar.total = trainer.num_epochs * trainer.num_iterations_per_epoch
        slower = trainer.num_epochs < planned
        trainer.print_to_log_file(
            f"{'slower' if slower else 'faster'} than timed: {'shortened' if slower else 'lengthened'} from {planned} "
            f"to {trainer.num_epochs} epochs, {'to end in time' if slower else 'for which there is time'}"
        )
    _save_epoch(trainer, clock, batch)


def begin_phase(trainer: SemiSupervisedTrainer, stopping: Callable[[], bool]) -> bool:
    """Lets the method work between two phases, then opens the streams of the new one; False if it was stopped."""
    waited = trainer.dataloader_train.waited
    # first, since their workers would take cores and memory from the work
    trainer.dataloader_train.close()
    trainer.dataloader_val.close()
    if not trainer.start_phase(stopping):
        return False
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.dataloader_train.waited = waited
    trainer.network.train()
    update_learning_rates(trainer)
    return True


def _start_phase(trainer: SemiSupervisedTrainer, stop: StopRequest, clock: _Clock) -> float:
    """Saves and begins a phase; the seconds that this took. A stop finds the checkpoint of before."""
    began = time.monotonic()
    trainer.meter.average(trainer.ranks.mean)
    _refuse_infinite(trainer)
    _warn_of_unlearned(trainer)
    _save_latest(trainer, clock)
    if not begin_phase(trainer, lambda: bool(stop)):
        _exit(trainer, stop)
    return time.monotonic() - began


def _open_epoch(trainer: SemiSupervisedTrainer) -> None:
    trainer.network.train()
    update_learning_rates(trainer)
    trainer.logger.log("epoch_start_timestamps", time.time(), trainer.current_epoch)
    trainer.logger.log("lrs", trainer.optimizer.param_groups[0]["lr"], trainer.current_epoch)


def _validate_online(trainer: SemiSupervisedTrainer) -> None:
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        batches = (next(trainer.dataloader_val) for _ in range(trainer.num_val_iterations_per_epoch))
        outputs = [trainer.validation_step(batch) for batch in batches]
        trainer.on_validation_epoch_end(trainer.ranks.gather(outputs))


def _close_epoch(trainer: SemiSupervisedTrainer, losses: dict[str, float], timing: dict[str, float], bar: Any) -> None:
    epoch, logger = trainer.current_epoch, trainer.logger
    logger.log("train_losses", losses["loss"], epoch)
    logger.log("epoch_end_timestamps", time.time(), epoch)
    dice = [float(value) for value in logger.get_value("dice_per_class_or_region", step=-1)]
    row = {
        "epoch": epoch,
        "iteration": trainer.iteration,
        "lr": logger.get_value("lrs", step=-1),
        **losses,
        "val_loss": float(logger.get_value("val_losses", step=-1)),
        "pseudo_dice": float(logger.get_value("mean_fg_dice", step=-1)),
        **{f"pseudo_dice_class_{i}": value for i, value in enumerate(dice, 1)},
        **timing,
    }
    trainer.history.append(row)
    seconds = logger.get_value("epoch_end_timestamps", step=-1) - logger.get_value("epoch_start_timestamps", step=-1)
    for line in (
        f"Epoch {epoch}",
        f"Current learning rate: {row['lr']:.5g}",
        f"train_loss {losses['loss']:.4f}",
        f"val_loss {row['val_loss']:.4f}",
        f"Pseudo dice {[round(value, 4) for value in dice]}",
        f"Epoch time: {seconds:.2f} s",
    ):
        trainer.print_to_log_file(line, also_print_to_console=False)
    remaining = timedelta(seconds=round(seconds * (trainer.num_epochs - epoch - 1)))
    terms = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "loss")
    step, share = timing["step_seconds"], timing["data_wait"] / max(timing["step_seconds"], 1e-9)
    # through the bar, which would be torn by a plain print
    bar.write(
        f"epoch {epoch + 1}/{trainer.num_epochs}: loss {losses['loss']:.4f} ({terms}), val {row['val_loss']:.4f}, "
        f"pseudo Dice {row['pseudo_dice']:.3f}, {step:.3f} s/step (data wait {share:.0%}), ETA {remaining}",
        file=sys.stdout,
    )
    sys.stdout.flush()


def _warn_of_starving(trainer: SemiSupervisedTrainer, timing: dict[str, float], clock: _Clock) -> None:
    """Says once which stream of patches keeps the step waiting."""
    share = timing["data_wait"] / max(timing["step_seconds"], 1e-9)
    if share < STARVING_SHARE or clock.has_warned:
        return
    clock.has_warned = True
    waited = trainer.dataloader_train.waited
    slower = max(waited, key=lambda name: waited[name])
    counts = worker_counts(trainer)
    workers = counts["labeled"] + (counts["unlabeled"] if trainer.uses_unlabeled else 0)
    trainer.print_to_log_file(
        f"WARNING: steps wait {share:.0%} of their time for patches, mostly {slower} ones. Raise nnUNet_n_proc_DA (now "
        f"{workers} worker processes) if cores are free; this also happens while other programs use the machine."
    )


def _warn_of_unlearned(trainer: SemiSupervisedTrainer) -> None:
    """Names the classes of which the last online validation found no voxel, unless none was there to be found."""
    if trainer.current_epoch == 0:
        return
    dice = trainer.logger.get_value("dice_per_class_or_region", step=-1)
    names = [name for _, name in sorted(class_names(trainer).items())]
    unlearned = [name for name, value in zip(names, dice, strict=True) if float(value) == 0]
    if unlearned:
        trainer.print_to_log_file(
            f"WARNING: after {trainer.iteration:,} steps not learned: {', '.join(unlearned)} (Dice 0 on the patches of "
            "the last epoch's validation). What is trained on predictions of this network will lack them; train longer."
        )


def _save_epoch(trainer: SemiSupervisedTrainer, clock: _Clock, batch: dict[str, Any] | None) -> None:
    """Counts the epoch as done, then writes curves, pictures (of its last batch) and checkpoints where they are due."""
    folder = Path(trainer.output_folder)
    trainer.meter.clear()
    trainer.current_epoch += 1
    if not trainer.ranks.is_main:
        return
    trainer.history.write_csv(folder / "curves.csv")
    done = trainer.current_epoch == trainer.num_epochs
    if done or time.monotonic() - clock.plotted > PLOT_EVERY_SECONDS:
        trainer.logger.plot_progress_png(str(folder))
        # figures are freed by the garbage collector only, and hold some 70 MB each
        gc.collect()
        clock.plotted = time.monotonic()
    average = _average_dice(trainer)
    if average is not None and (trainer._best_ema is None or average > trainer._best_ema):
        trainer._best_ema = average
        if not trainer.disable_checkpointing:
            checkpoint.save(trainer, folder / BEST, resumable=False)
    due = trainer.current_epoch % SAVE_EVERY_EPOCHS == 0 or time.monotonic() - clock.saved > SAVE_EVERY_SECONDS
    if due and not done:
        _save_latest(trainer, clock)
    _save_preview(trainer, clock, batch)


def _save_preview(trainer: SemiSupervisedTrainer, clock: _Clock, batch: dict[str, Any] | None) -> None:
    """Writes a picture if it is due; none for an epoch whose last step was made before the training was continued."""
    if batch is None or not preview_is_due(trainer, trainer.current_epoch, time.monotonic() - clock.pictured):
        return
    clock.pictured = time.monotonic()
    try:
        save_preview_of_epoch(trainer, batch, trainer.current_epoch)
        gc.collect()
    except Exception as error:
        # a picture is a service, and no reason to end a training
        trainer.print_to_log_file(f"WARNING: no preview of epoch {trainer.current_epoch}: {error}")


def _average_dice(trainer: SemiSupervisedTrainer) -> float | None:
    """nnU-Net's moving average of the pseudo Dice, over the epochs of this phase; None before its first has ended."""
    began = max(start for start in (0, *trainer.phase_starts) if start < trainer.iteration)
    first = -(-began // trainer.num_iterations_per_epoch)
    values = [float(value) for value in trainer.logger.get_value("mean_fg_dice", step=None)[first:]]
    return reduce(lambda average, value: 0.9 * average + 0.1 * value, values) if values else None


def _save_latest(trainer: SemiSupervisedTrainer, clock: _Clock) -> None:
    clock.begin()
    trainer.save_checkpoint(str(Path(trainer.output_folder, LATEST)))
    clock.saved = time.monotonic()


def _save_or_stop(trainer: SemiSupervisedTrainer, stop: StopRequest, clock: _Clock) -> None:
    """Saves, or saves and stops, if this or another rank wishes it."""
    overdue = trainer.ranks.is_main and time.monotonic() - clock.saved > SAVE_EVERY_SECONDS
    decision = trainer.ranks.agree(STOP if stop else SAVE if overdue else GO_ON)
    if decision == GO_ON:
        return
    trainer.meter.average(trainer.ranks.mean)
    _refuse_infinite(trainer)
    _save_latest(trainer, clock)
    if decision == STOP:
        _exit(trainer, stop)


def _epoch_losses(trainer: SemiSupervisedTrainer) -> dict[str, float]:
    """Means of the losses of a whole epoch.

    In fp16 numbers can overflow in single steps. The loss scaler drops the updates of these, as in nnU-Net, so they are
    left out of the means and told. Only an epoch of nothing else is refused, and gradients that overflow however small
    the scale of the loss has become.
    """
    meter, steps, epoch = trainer.meter, trainer.num_iterations_per_epoch, trainer.current_epoch
    if trainer.grad_scaler is None:
        _refuse_infinite(trainer)
        return meter.means()
    dropped = meter.count_infinite()
    if dropped == steps:
        _refuse_infinite(trainer, even_if_scaled=True)
    if trainer.grad_scaler.get_scale() < LEAST_SCALE:
        raise UserError(
            f"the gradients are not finite in {trainer.precision.name}",
            where=f"epoch {epoch} of {trainer.output_folder}",
            fix="continue (--c) is of no use; train anew (--overwrite) with --precision bf16 or fp32",
        )
    if dropped:
        trainer.print_to_log_file(
            f"WARNING: in {dropped} of {steps} steps of epoch {epoch} the loss was not finite in "
            f"{trainer.precision.name}: they were skipped. If they become many, train with --precision bf16 or fp32"
        )
    return meter.finite_means()


def _refuse_infinite(trainer: SemiSupervisedTrainer, even_if_scaled: bool = False) -> None:
    """``UserError`` if a loss of this epoch is not finite, so that the last good checkpoint stays.

    Where a loss scaler has kept such losses from the weights, a checkpoint of them is good.
    """
    bad = not_finite(trainer.meter.means())
    if bad and (even_if_scaled or trainer.grad_scaler is None):
        raise UserError(
            f"the loss is not finite: {', '.join(bad)}",
            where=f"epoch {trainer.current_epoch} of {trainer.output_folder}",
            fix="train anew (--overwrite) with a lower learning rate (--set initial_lr=...) or with --precision fp32",
        )


def _exit(trainer: SemiSupervisedTrainer, stop: StopRequest) -> NoReturn:
    reason = stop.reason or "a signal to another rank"
    trainer.print_to_log_file(
        f"stopped by {reason} after step {trainer.iteration}; the same command with --c continues from here"
    )
    sys.exit(0)


def _finish(trainer: SemiSupervisedTrainer) -> None:
    folder = Path(trainer.output_folder)
    trainer.save_checkpoint(str(folder / FINAL))
    if trainer.ranks.is_main:
        (folder / LATEST).unlink(missing_ok=True)
    _warn_of_unlearned(trainer)
    trainer.print_to_log_file("Training done.")
