"""`nnssl_train --minutes`: what fits into a time, and what is timed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnssl.cli import run as run_command
from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine import budget, deadline, pseudo_labeling
from nnssl.trainers.engine.budget import Budget, Costs, measure_costs, plan_budget
from nnssl.trainers.engine.deadline import Deadline, keep_deadline, phase_boundaries
from nnssl.trainers.engine.request import TrainingRequest
from nnssl.trainers.engine.trial import trial
from tests.support.tiny import DEVICE, PLANS, Tiny

CHEAP = Costs(step=0.1, start=0)


def plan(costs: Costs, minutes: float, spent: float = 0.0, **options: int) -> Budget:
    return plan_budget(costs, minutes, asked_at=1000.0, now=1000.0 + spent, **options)


@pytest.mark.parametrize(
    ("costs", "minutes", "options", "epochs", "steps"),
    [
        # 100 minutes, 90 % of them: 5,400 s
        (CHEAP, 100, {}, 216, 250),
        (CHEAP, 100, {"spent": 540.0}, 194, 250),
        (Costs(step=0.1, start=40, between=400, after=100), 100, {}, 194, 250),
        (CHEAP, 100, {"iterations_per_epoch": 1000}, 54, 1000),
        # short trainings have epochs of fewer steps: 1,000 steps in 100 s
        (CHEAP, 100 / 54, {}, 20, 50),
        (CHEAP, 10 / 54, {}, 20, 5),
    ],
)
def test_length_of_a_training(costs, minutes, options, epochs, steps):
    found = plan(costs, minutes, **options)
    due = 1000 + 60 * minutes - costs.after
    assert found.deadline == Deadline(due, due - 6 * minutes)
    assert (found.epochs, found.iterations_per_epoch, found.steps) == (epochs, steps, epochs * steps)
    assert f"{epochs} epochs of {steps} steps" in found.explanation


def test_batches_that_workers_hold_ready_are_not_timed(monkeypatch):
    """They come at once, however slow the workers are."""
    ready = 1 + 3 * 2  # the first, and what each of two workers has prefetched meanwhile
    slow = 0.02

    class Stream:
        taken = 0

        def __next__(self) -> None:
            Stream.taken += 1
            if Stream.taken > ready:
                time.sleep(slow)

    trainer = SimpleNamespace(dataloader_train=Stream(), device=torch.device("cpu"))
    monkeypatch.setattr(budget, "worker_counts", lambda trainer: {"labeled": 2, "unlabeled": 1})
    assert budget._drain(trainer) >= 2 * slow
    assert budget._median_seconds(trainer, lambda: next(trainer.dataloader_train)) >= slow


def test_the_training_ends_in_time():
    for minutes in (1, 7.3, 60, 1000):
        costs = Costs(step=0.0123, start=17, between=5)
        found = plan(costs, minutes, spent=3)
        assert 3 + costs.seconds_for(found.steps) <= 0.9 * 60 * minutes
        # by less than an epoch
        assert 3 + costs.seconds_for(found.steps + found.iterations_per_epoch) > 0.9 * 60 * minutes - found.steps / 20


@pytest.mark.parametrize(
    ("costs", "options", "needed"),
    [
        (Costs(step=1, start=0), {}, 2),  # 100 s of 90 %
        (Costs(step=0.1, start=0, after=600), {}, 12),
        (CHEAP, {"iterations_per_epoch": 1000}, 2),
        (CHEAP, {"spent": 60.0}, 2),
    ],
)
def test_too_few_minutes(costs, options, needed):
    with pytest.raises(UserError, match=rf"--minutes {needed} or more"):
        plan(costs, 1, **options)
    assert plan(costs, needed, **options).epochs >= 1


def request(trainer: str, fold: str = "all", **options: Any) -> TrainingRequest:
    options = {"iterations_per_epoch": 5, "disable_memory_check": True} | options
    return TrainingRequest("901", trainer, fold, plans=PLANS, **options)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return Tiny(labeled=3, labeled_batch=2).write(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "phases"),
    [("Supervised", [0]), ("BCP", [0, 12]), ("SelfTraining", [0, 33, 67]), ("SwitchedSelfTraining", [0, 33])],
)
def test_every_phase_is_timed(name, phases, tiny, monkeypatch):
    real, seen = SemiSupervisedTrainer.train_step, []

    def train_step(self, batch):
        rows = 0 if batch["unlabeled"] is None else len(batch["unlabeled"])
        seen.append((self.iteration, rows))
        return real(self, batch)

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", train_step)
    with trial(request(name, epochs=10, iterations_per_epoch=10), DEVICE) as trainer:
        costs = measure_costs(trainer)
    assert costs.step > 0
    assert costs.start > 0
    assert (costs.cases > 0) == ("SelfTraining" in name)
    assert [iteration for iteration, _ in seen[::7]] == phases
    # patches without labels come where the method has them
    expected = {"Supervised": {0}, "BCP": {trainer.num_unlabeled}, "SelfTraining": {trainer.num_unlabeled},
                "SwitchedSelfTraining": {0}}[name]  # fmt: skip
    assert {rows for iteration, rows in seen if iteration >= phases[-1]} == expected


def test_validation_cases_take_time(tiny):
    with trial(request("Supervised", "0"), DEVICE) as trainer:
        assert measure_costs(trainer).after > 0


@pytest.mark.parametrize(("limit", "predictions"), [(5.0, 2), (0.3, 1)])
def test_the_first_prediction_is_not_timed_unless_it_takes_long(limit, predictions, tiny, monkeypatch):
    real, times = pseudo_labeling.predict_logits, []

    def predict_logits(*arguments):
        times.append(1.0 if not times else 0.0)
        time.sleep(times[-1])
        return real(*arguments)

    monkeypatch.setattr(pseudo_labeling, "predict_logits", predict_logits)
    monkeypatch.setattr(budget, "_PREDICTED_AGAIN", limit)
    with trial(request("SelfTraining"), DEVICE) as trainer:
        cases = measure_costs(trainer).between / (2 * len(trainer.split().unlabeled))
    assert len(times) == predictions
    assert (cases > 1) == (predictions == 1)


def test_a_lack_of_memory_while_steps_are_timed_is_told(tiny, monkeypatch):
    def exhausted(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(budget, "measure_costs", exhausted)
    with pytest.raises(UserError, match="memory of cpu does not suffice"):
        budget.costs_of(request("Supervised", minutes=5), DEVICE)


def test_only_validation_cases_are_mirrored_where_pseudo_labels_are_not(tiny, monkeypatch):
    real, asked = budget.predictor_of, []

    def noted(trainer, mirroring=True):
        asked.append(mirroring)
        return real(trainer, mirroring)

    monkeypatch.setattr(budget, "predictor_of", noted)
    for setting, expected in (("True", [True]), ("False", [False, True])):
        with trial(request("SelfTraining", "0", overrides=[f"mirrored_pseudo_labels={setting}"]), DEVICE) as trainer:
            costs = measure_costs(trainer)
        assert asked == expected
        assert min(costs.between, costs.after) > 0
        asked.clear()


def test_the_second_stage_of_a_cascade_is_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    tiny = Tiny(labeled=3, cascade=True).write(tmp_path, monkeypatch)
    for fold in range(3):
        lowres = tiny.bare_trainer("Supervised", fold=fold, configuration="3d_lowres")
        lowres.initialize()
        lowres.perform_actual_validation()
    with trial(request("Supervised", "0", configuration=tiny.configuration), DEVICE) as trainer:
        assert trainer.is_cascaded
        assert measure_costs(trainer).after > 0


def test_a_training_of_some_minutes(tiny, monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure_costs", lambda trainer: Costs(step=100, start=0))
    monkeypatch.setattr(budget, "FEWEST_STEPS", 4)
    monkeypatch.setattr(budget, "EPOCHS", 2)
    command = ["901", "Supervised", "all", "-p", PLANS, "-device", "cpu", "--disable_memory_check"]
    assert run_command("train", [*command, "--minutes", "10"]) == 0
    assert "2 epochs of 2 steps" in capsys.readouterr().out
    (folder,) = Path(tiny.folder, "nnUNet_results").glob("*/Supervised__*/fold_all")
    hyperparameters = json.loads((folder / "run.json").read_text())["hyperparameters"]
    assert (hyperparameters["num_epochs"], hyperparameters["num_iterations_per_epoch"]) == (2, 2)
    assert sorted(path.name for path in folder.parents[2].iterdir()) == [folder.parents[1].name]


@pytest.fixture
def took(monkeypatch):
    """Trains epochs of two steps that take so many seconds, one after the other, from second 0 on."""
    now = 0.0
    monkeypatch.setattr(deadline, "_now", lambda: now)

    def took(trainer: SemiSupervisedTrainer, *seconds: float, pause: float = 0.0) -> float:
        """Until when, with a pause after each epoch."""
        nonlocal now
        logged = len(trainer.logger.get_value("epoch_end_timestamps", step=None))
        for epoch, duration in list(enumerate(seconds))[logged:]:
            began = sum(seconds[:epoch]) + epoch * pause
            trainer.logger.log("epoch_start_timestamps", began, epoch)
            trainer.logger.log("epoch_end_timestamps", began + duration, epoch)
            now = began + duration + pause
        trainer.current_epoch, trainer.iteration = len(seconds) - 1, 2 * len(seconds)
        return now

    return took


def ends_with(trainer: SemiSupervisedTrainer, epochs: int) -> bool:
    """Whether the learning rate goes to zero within that many epochs."""
    rates = []
    for epoch in (epochs - 1, epochs):
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    return rates[0] > rates[1] == 0


@pytest.mark.parametrize(
    ("left", "pause", "epochs"),
    # an epoch takes 10 s, four of ten are done
    [(None, 0, 10), (1000, 0, 10), (61, 0, 10), (59, 0, 9), (25, 0, 6), (5, 0, 4), (-100, 0, 4), (59, 5, 7)],
)
def test_a_training_that_is_late_is_shortened(tiny, took, left, pause, epochs):
    trainer = tiny.trainer("Supervised", num_epochs=10)
    # the first one counts as little as an exception
    now = took(trainer, 500, 10, 90, 10, pause=pause)
    trainer.deadline = None if left is None else Deadline(now + left, now + left)
    assert keep_deadline(trainer) == (epochs < 10)
    assert trainer.num_epochs == epochs
    assert ends_with(trainer, epochs)


@pytest.mark.parametrize(
    ("left", "done", "epochs"),
    # an epoch takes 10 s
    [(81, 3, 11), (79, 3, 10), (1000, 3, 103), (1000, 2, 10), (1000, 4, 10), (None, 3, 10)],
)
def test_a_training_that_is_early_is_lengthened_once(tiny, took, left, done, epochs):
    trainer = tiny.trainer("Supervised", num_epochs=10)
    now = took(trainer, *[500, 10, 10, 10][:done])
    trainer.deadline = None if left is None else Deadline(now + left + 500, now + left)
    assert keep_deadline(trainer) == (epochs > 10)
    assert trainer.num_epochs == epochs
    assert trainer.settings.planned_epochs == (10 if epochs > 10 else None)
    assert ends_with(trainer, epochs)
    if epochs > 10:
        trainer.deadline = Deadline(10_000, 10_000)
        for further in range(3, epochs - 1):
            took(trainer, 500, *[10] * further)
            assert not keep_deadline(trainer)


def test_a_training_as_fast_as_timed_keeps_its_length_and_the_reserve(tiny, took):
    found = plan(Costs(step=5, start=0, after=600), 50, iterations_per_epoch=2)
    trainer = tiny.trainer("Supervised", num_epochs=found.epochs)
    assert found.epochs == 210  # 2,100 of 2,700 s
    trainer.deadline = Deadline(found.deadline.due - 1000, found.deadline.planned - 1000)
    for done in range(1, found.epochs):
        took(trainer, *[10] * done)
        assert not keep_deadline(trainer)


def test_a_lengthened_training_is_continued_as_it_was(tiny, took, tmp_path):
    trainer = tiny.trainer("BCP", num_epochs=30, pretrain_share=0.1)
    boundaries, recipe = phase_boundaries(trainer), trainer.recipe
    now = took(trainer, *[10] * 10)
    trainer.deadline = Deadline(now + 99_990, now + 99_990)
    assert keep_deadline(trainer)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    continued = tiny.bare_trainer("BCP")
    continued.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert (continued.num_epochs, continued.settings.planned_epochs) == (10 + 9999, 30)
    assert (phase_boundaries(continued), continued.recipe) == (boundaries, recipe)
    assert continued.recipe == "short"
    assert ends_with(continued, 10 + 9999)


@pytest.mark.parametrize(
    ("name", "options", "first", "decided"),
    [
        ("SelfTraining", {}, 20, 23),
        ("BCP", {"pretrain_share": 0.1}, 3, 10),
        # a learning rate that has almost fallen would rise again
        ("BCP", {"pretrain_share": 2 / 3}, 20, None),
        ("SelfTraining", {"warm_start": True, "one_schedule": True}, 20, None),
    ],
)
def test_a_last_phase_is_lengthened_while_its_schedule_is_young(name, options, first, decided, tiny, took):
    trainer = tiny.trainer(name, num_epochs=30, **options)
    boundaries = phase_boundaries(trainer)
    assert boundaries[-1] == 2 * first
    for done in range(1, 30):
        now = took(trainer, *[*[10] * first, 500, *[10] * 29][:done])
        trainer.deadline = Deadline(now + 600, now + 500)
        assert keep_deadline(trainer) == (done == decided), done
    assert trainer.num_epochs == (30 if decided is None else decided + 50)
    assert phase_boundaries(trainer) == boundaries
    assert trainer.settings.planned_epochs == (None if decided is None else 30)


def test_the_first_epoch_decides_nothing(tiny, took):
    trainer = tiny.trainer("Supervised", num_epochs=10)
    now = took(trainer, 500)
    trainer.deadline = Deadline(now, now)
    assert not keep_deadline(trainer)


@pytest.mark.parametrize("name", ["SelfTraining", "BCP"])
def test_only_the_last_phase_is_shortened_and_no_boundary_moves(name, tiny, took):
    options = {"SelfTraining": {}, "BCP": {"pretrain_share": 2 / 3}}[name]
    trainer = tiny.trainer(name, num_epochs=30, **options)
    boundaries = phase_boundaries(trainer)
    assert boundaries[-1] == 40
    # predictions before the last phase are part of its first epoch
    for done, shortened in ((19, False), (20, False), (21, False), (22, True)):
        now = took(trainer, *[*[10] * 20, 500, 10][:done])
        trainer.deadline = Deadline(now, now)
        assert keep_deadline(trainer) == shortened, done
    assert trainer.num_epochs == 22
    assert phase_boundaries(trainer) == boundaries
    assert trainer.progress == 1 or name == "SelfTraining"


def test_a_late_training_ends_early_and_whole(tiny, monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure_costs", lambda trainer: Costs(step=0.1, start=0))
    monkeypatch.setattr(deadline, "_now", lambda: time.time() + 6000)
    command = ["901", "Supervised", "all", "-p", PLANS, "-device", "cpu", "--disable_memory_check"]
    assert run_command("train", [*command, "--minutes", "50", "--set", "num_iterations_per_epoch=2"]) == 0
    assert "slower than timed: shortened from" in capsys.readouterr().out
    (folder,) = Path(tiny.folder, "nnUNet_results").glob("*/Supervised__*/fold_all")
    content = read_model_checkpoint(folder / "checkpoint_final.pth")
    assert content["current_epoch"] == 2
    record = json.loads((folder / "run.json").read_text())
    assert record["hyperparameters"]["num_epochs"] == 2
    assert record["settings"]["planned_epochs"] > 10_000


def test_an_early_training_goes_on_longer(tiny, monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure_costs", lambda trainer: Costs(step=4, start=0))
    monkeypatch.setattr(deadline, "_epochs_in_time", lambda trainer, began: 13)
    command = ["901", "Supervised", "all", "-p", PLANS, "-device", "cpu", "--disable_memory_check"]
    assert run_command("train", [*command, "--minutes", "8", "--set", "num_iterations_per_epoch=10"]) == 0
    assert "faster than timed: lengthened from 10 to 13 epochs" in capsys.readouterr().out
    (folder,) = Path(tiny.folder, "nnUNet_results").glob("*/Supervised__*/fold_all")
    assert read_model_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 13
    record = json.loads((folder / "run.json").read_text())
    assert record["hyperparameters"]["num_epochs"] == 13
    assert record["settings"]["planned_epochs"] == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "must be a time above 0"),
        (["--minutes", "nan"], "must be a time above 0"),
        (["--minutes", "5", "--epochs", "3"], "decides on the number of epochs"),
        (["--minutes", "5", "--set", "num_epochs=3"], "decides on the number of epochs"),
    ],
)
def test_minutes_that_mean_nothing(flags, message, capsys):
    assert run_command("train", ["901", "Supervised", "all", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_timed_training_leaves_nothing(tiny):
    results = Path(tiny.folder, "nnUNet_results")
    before = sorted(results.rglob("*"))
    with trial(request("Supervised"), DEVICE) as trainer:
        measure_costs(trainer)
        folder = Path(trainer.output_folder)
        assert folder.exists()
        assert not folder.is_relative_to(results)
    assert sorted(results.rglob("*")) == before
    assert not folder.exists()
