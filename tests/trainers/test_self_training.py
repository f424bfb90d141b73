from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle

from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine import pseudo_labeling
from nnssl.trainers.engine.registered_labels import drawn_by_name
from nnssl.trainers.engine.schedule import update_learning_rates
from tests.support.tiny import Tiny

# rounds of two steps each
BUDGET = {"num_epochs": 3, "num_iterations_per_epoch": 2, "mirror_axes": (), "drop_share": 0.4}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny().write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in unwrap(trainer.network).state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def table(trainer, number: int) -> list[dict[str, str]]:
    with open(trainer.stability_file(number), newline="") as stream:
        return list(csv.DictReader(stream))


def _write_masks(tiny: Tiny, folder: Path, cases: list[str]) -> None:
    """Masks on the grids of scans, of which preprocessing has cut off two slices at either end of the first axis."""
    folder.mkdir()
    for case in cases:
        mask = np.zeros((24, 20, 20), np.uint8)
        mask[2:6] = 1
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / f"{case}.nii.gz"))
        properties = {
            "spacing": [1.0] * 3,
            "shape_before_cropping": (24, 20, 20),
            "bbox_used_for_cropping": [[2, 22], [0, 20], [0, 20]],
        }
        save_pickle(properties, str(tiny.base / f"{tiny.identifier}_unlabeled" / f"{case}.pkl"))


def test_round_0_learns_from_masks_that_it_is_given(tiny, tmp_path):
    masks = tmp_path / "masks"
    _write_masks(tiny, masks, ["unlabeled_0", "unlabeled_2"])
    trainer = tiny.trainer("SelfTraining", **BUDGET, initial_pseudo_labels=str(masks))
    trainer.on_train_start()
    cases = trainer.unlabeled_cases()
    assert cases.identifiers == ["unlabeled_0", "unlabeled_2"]
    labels = cases.load_case("unlabeled_2")[1][:]
    assert labels.shape == (1, 20, 20, 20)
    assert (labels[:, :4] == 1).all()
    assert (labels[:, 4:] == 0).all()
    assert trainer.train_step(next(trainer.dataloader_train))["pseudo"] > 0
    shutil.rmtree(masks)
    trainer.iteration = 1
    assert trainer.unlabeled_cases().identifiers == cases.identifiers, "a continued training needs them no more"


def test_given_masks_may_be_all_that_a_training_learns_from(tiny, tmp_path):
    masks = tmp_path / "masks"
    _write_masks(tiny, masks, ["unlabeled_0"])
    budget = {"rounds": 1, "initial_pseudo_labels": str(masks), "labeled_batch_size": 2}
    for name in ("SelfTraining", "SwitchedSelfTraining"):
        trainer = tiny.trainer(name, **BUDGET | budget)
        assert trainer.phase_starts == ()
        trainer.run_training()
        assert trainer.iteration == trainer.num_epochs * trainer.num_iterations_per_epoch
        assert not list(Path(trainer.output_folder).glob("round_*"))


def test_cases_to_register_are_drawn_by_name_and_nested():
    unlabeled = [f"case_{number}" for number in range(9)]
    assert drawn_by_name(unlabeled, 0) == drawn_by_name(reversed(unlabeled), 99) == unlabeled
    nested = [set(drawn_by_name(unlabeled, number)) for number in range(1, 10)]
    assert [len(cases) for cases in nested] == list(range(1, 10))
    assert all(fewer < more for fewer, more in itertools.pairwise(nested))


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [(7, (24, 20, 20), "no class"), (1, (20, 20, 20), "another shape"), (None, None, "no unlabeled case")],
)
def test_masks_that_do_not_fit_are_refused(tiny, tmp_path, value, shape, message):
    masks = tmp_path / "masks"
    _write_masks(tiny, masks, ["unlabeled_0"] if shape else [])
    if shape:
        image = sitk.GetImageFromArray(np.full(shape, value, np.uint8))
        sitk.WriteImage(image, str(masks / "unlabeled_0.nii.gz"))
    trainer = tiny.trainer("SelfTraining", **BUDGET, initial_pseudo_labels=str(masks))
    with pytest.raises(UserError, match=message):
        trainer.on_train_start()


@pytest.mark.parametrize(
    ("epochs", "iterations", "options", "expected"),
    [
        (3, 2, {}, (2, 4)),
        (5, 2, {}, (3, 7)),
        (1, 8, {"rounds": 2}, (4,)),
        (1, 10, {"round_shares": (0.5, 0.2, 0.3)}, (5, 7)),
        (1, 10, {"round_shares": (2.0, 1.0, 7.0)}, (2, 3)),
        (1, 10, {"round_shares": (1e-9, 1e-9, 1.0)}, (1, 2)),
        (1, 10, {"round_shares": (1.0, 1e-9, 1e-9)}, (8, 9)),
        (1, 2, {}, (1,)),
    ],
)
def test_rounds_share_the_steps_of_the_run(tiny, epochs, iterations, options, expected):
    trainer = tiny.bare_trainer("SelfTraining")
    trainer.configure({"num_epochs": epochs, "num_iterations_per_epoch": iterations} | options)
    assert trainer.phase_starts == expected
    rounds = []
    for trainer.iteration in range(epochs * iterations):
        rounds.append(trainer.current_round)
    assert rounds == sorted(rounds)
    assert [rounds.index(number) for number in range(1, len(expected) + 1)] == list(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1}, "rounds must be at least 2"),
        ({"round_shares": (0.5, 0.5)}, "positive share for each round"),
        ({"round_shares": (1.0, 0.0, 1.0)}, "positive share for each round"),
        ({"registered_cases": -1, "initial_pseudo_labels": "registration"}, "registered_cases must be 0"),
        ({"registered_cases": 4}, "registered_cases must be 0"),
        ({"registered_cases": 4, "initial_pseudo_labels": "masks"}, "registered_cases must be 0"),
        ({"drop_share": 1.0}, "drop_share"),
        ({"drop_share": -0.1}, "drop_share"),
        ({"used_shares": (0.5, 0.0)}, "used_shares must be above 0 and at most 1"),
        ({"used_shares": (1.5,)}, "used_shares must be above 0 and at most 1"),
        ({"used_shares": (0.5, 0.5, 1.0)}, "used_shares must have a share per round"),
        ({"ema_decay": 0.9, "rounds": 1, "initial_pseudo_labels": "masks"}, "ema_decay must be 0 with a single round"),
        ({"pseudo_weight": 0.0}, "pseudo_weight must be above 0"),
        ({"pretrain_share": 0.2}, "round 0 is that phase"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(tiny, options, message):
    trainer = tiny.trainer("SelfTraining", **options)
    with pytest.raises(UserError, match=message):
        trainer.run_training()
    assert trainer.iteration == 0


def test_every_round_has_the_learning_rates_of_a_training_of_its_length(tiny):
    trainer = tiny.trainer("SelfTraining", num_epochs=9, num_iterations_per_epoch=7)
    alone = tiny.trainer("Supervised", num_epochs=3, num_iterations_per_epoch=7)
    expected = []
    for alone.current_epoch in range(3):
        update_learning_rates(alone)
        expected.append(alone.optimizer.param_groups[0]["lr"])
    rates = []
    for epoch in range(9):
        for step in (0, 5):
            trainer.current_epoch, trainer.iteration = epoch, 7 * epoch + step
            update_learning_rates(trainer)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[::2] == rates[1::2] == expected * 3


def test_round_0_is_supervised_to_the_bit(tiny):
    alone = tiny.trainer("Supervised", num_epochs=2, num_iterations_per_epoch=2, mirror_axes=())
    alone.run_training()
    trainer = tiny.trainer("SelfTraining", rounds=2, num_epochs=4, num_iterations_per_epoch=2, mirror_axes=())
    trainer.run_training()
    saved = read_model_checkpoint(trainer.round_folder(0) / "checkpoint_final.pth")
    assert equal(saved["network_weights"], weights(alone))
    assert [row["loss"] for row in trainer.history.rows[:2]] == [row["loss"] for row in alone.history.rows]
    assert not equal(saved["network_weights"], weights(trainer))


def test_rounds_are_visible_in_the_run_folder_and_the_least_stable_case_is_left_out(tiny, monkeypatch):
    trainer = tiny.trainer("SelfTraining", **BUDGET)
    drawn = {}
    real = trainer.unlabeled_cases

    def spy():
        cases = real()
        drawn[trainer.current_round] = None if cases is None else cases.identifiers
        return cases

    monkeypatch.setattr(trainer, "unlabeled_cases", spy)
    trainer.run_training()
    everything = [f"unlabeled_{i}" for i in range(3)]
    for number in (0, 1):
        folder = trainer.round_folder(number)
        assert {p.name for p in folder.iterdir()} == {"checkpoint_final.pth", "pseudo_labels", "stability.csv"}
        assert sorted(p.name for p in (folder / "pseudo_labels").iterdir()) == [f"{case}.b2nd" for case in everything]
    assert [row["used"] for row in table(trainer, 0)] == ["yes"] * 3
    rows = table(trainer, 1)
    worst = max(rows, key=lambda row: float(row["mean_instability"]))
    assert [row["used"] for row in rows] == ["no" if row is worst else "yes" for row in rows]
    assert drawn == {0: None, 1: everything, 2: [row["case"] for row in rows if row["used"] == "yes"]}
    assert {"supervised", "pseudo"} <= set(trainer.history.rows[-1])
    assert "pseudo" not in trainer.history.rows[0]


def test_rounds_use_their_shares_of_the_cases(tiny):
    budget = BUDGET | {"num_epochs": 4, "rounds": 4, "drop_share": 0.0}
    trainer = tiny.trainer("SelfTraining", **budget, used_shares=(0.3, 0.6))
    trainer.run_training()
    used = [sum(row["used"] == "yes" for row in table(trainer, number)) for number in range(3)]
    assert used == [1, 2, 2]
    assert "lowest estimated Dice" in next(row["reason"] for row in table(trainer, 0) if row["used"] == "no")


def test_pseudo_labels_are_learned_with_their_weight(tiny):
    losses = []
    for weight in (1.0, 0.25):
        trainer = tiny.trainer("SelfTraining", pseudo_weight=weight)
        trainer.iteration = trainer.phase_starts[0]
        losses.append(trainer.train_step(tiny.batch()))
    torch.testing.assert_close(losses[1]["pseudo"], 0.25 * losses[0]["pseudo"])
    assert torch.equal(losses[1]["supervised"], losses[0]["supervised"])
    # a reference in place of the pseudo-label gives nnU-Net's own loss
    step = trainer.make_step(tiny.batch())
    trainer.forward(step)
    expected = trainer.loss([head[1:] for head in step.heads], step.pseudo_target)
    assert torch.equal(trainer.unsupervised_loss(step)["pseudo"], 0.25 * expected)


@pytest.mark.parametrize("warm", [False, True])
def test_rounds_begin_with_new_weights_unless_started_warm(tiny, monkeypatch, warm):
    monkeypatch.setattr("nnssl.trainers.self_training.predict_unlabeled", lambda *arguments: True)
    trainer = tiny.trainer("SelfTraining", warm_start=warm, **BUDGET)
    monkeypatch.setattr(trainer, "_select", lambda ended: None)
    first = weights(trainer)
    trainer._best_ema = 0.9
    trainer.train_step(tiny.batch() | {"unlabeled": None})
    trained = weights(trainer)
    starts = []
    for start in trainer.phase_starts:
        trainer.iteration = start
        assert trainer.start_phase(lambda: False)
        assert not trainer.optimizer.state
        assert trainer._best_ema is None
        starts.append(weights(trainer))
    if warm:
        assert all(equal(trained, start) for start in starts)
    else:
        assert not any(equal(starts[0], other) for other in (first, trained, starts[1]))
        trainer.iteration = trainer.phase_starts[0]
        trainer.start_phase(lambda: False)
        assert equal(weights(trainer), starts[0])


def test_rounds_can_be_one_training(tiny, monkeypatch):
    monkeypatch.setattr("nnssl.trainers.self_training.predict_unlabeled", lambda *arguments: True)
    trainer = tiny.trainer("SelfTraining", warm_start=True, one_schedule=True, **BUDGET)
    plain = tiny.trainer("Supervised", num_epochs=3, num_iterations_per_epoch=2)
    monkeypatch.setattr(trainer, "_select", lambda ended: None)
    rates = []
    for number in range(6):
        trainer.current_epoch = plain.current_epoch = number // 2
        if number in trainer.phase_starts:
            assert trainer.start_phase(lambda: False)
            assert trainer.optimizer.state
        for one in (trainer, plain):
            update_learning_rates(one)
        trainer.train_step(tiny.batch(number) | ({"unlabeled": None} if number < 2 else {}))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        assert rates[-1] == plain.optimizer.param_groups[0]["lr"]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3
    with pytest.raises(UserError, match="one_schedule"):
        tiny.trainer("SelfTraining", one_schedule=True, **BUDGET).on_train_start()


@pytest.mark.parametrize("warm", [False, True])
def test_an_average_of_students_makes_the_pseudo_labels(tiny, monkeypatch, warm):
    predicted = []
    monkeypatch.setattr(
        "nnssl.trainers.self_training.predict_unlabeled",
        lambda trainer, *arguments: predicted.append(trainer.deployed_network()) or True,
    )
    trainer = tiny.trainer("SelfTraining", warm_start=warm, ema_decay=0.75, **BUDGET)
    monkeypatch.setattr(trainer, "_select", lambda ended: None)
    students = []

    def step(number):
        trainer.train_step(tiny.batch(number) | ({"unlabeled": None} if number < 2 else {}))
        students.append(weights(trainer))

    def averaged(*shares):
        mean = {key: sum(share * one[key] for share, one in zip(shares, students, strict=True)) for key in students[0]}
        torch.testing.assert_close(dict(trainer.teacher.network.state_dict()), mean)
        assert trainer.deployed_network() is unwrap(trainer.network)

    step(0)
    step(1)
    averaged(0.5, 0.5)  # the plain mean at first
    assert trainer.start_phase(lambda: False)
    assert predicted == [trainer.teacher.network]
    kept = read_model_checkpoint(trainer.round_folder(0) / "checkpoint_final.pth")["network_weights"]
    assert equal(kept, trainer.teacher.network.state_dict())
    assert not equal(kept, weights(trainer))
    step(2)
    averaged(*(1 / 3, 1 / 3, 1 / 3) if warm else (0, 0, 1))
    step(3)
    averaged(*(0.25, 0.25, 0.25, 0.25) if warm else (0, 0, 0.5, 0.5))
    with pytest.raises(UserError, match="ema_decay"):
        tiny.trainer("SelfTraining", ema_decay=1.0, **BUDGET).on_train_start()


class Killed(BaseException):
    """What no handler of the package catches, like the end of the process."""


ONE_TRAINING = {"warm_start": True, "one_schedule": True, "ema_decay": 0.5, "used_shares": (0.5, 1.0)}


@pytest.mark.parametrize("options", [{}, ONE_TRAINING], ids=["rounds from scratch", "one training"])
@pytest.mark.parametrize(("how", "call"), [("stop file", 2), ("killed", 5)], ids=["stopped first", "killed later"])
def test_prediction_that_is_interrupted_goes_on_where_it_was(tiny, monkeypatch, how, call, options):
    calls = []
    real = pseudo_labeling.predict_logits

    def predict(predictor, image):
        calls.append(float(image.sum()))
        if len(calls) == call and how == "killed":
            raise Killed
        if len(calls) == call:
            Path(trainer.output_folder, "stop").touch()
        return real(predictor, image)

    trainer = tiny.trainer("SelfTraining", **BUDGET, **options)
    trainer.run_training()
    expected, rows = weights(trainer), [table(trainer, number) for number in (0, 1)]
    average = trainer.teacher.network.state_dict() if options else {}

    monkeypatch.setattr(pseudo_labeling, "predict_logits", predict)
    trainer = tiny.trainer("SelfTraining", **BUDGET, **options)
    with pytest.raises(Killed if how == "killed" else SystemExit) as ended:
        trainer.run_training()
    if how == "stop file":
        assert not ended.value.code
    latest = Path(trainer.output_folder, "checkpoint_latest.pth")
    assert read_model_checkpoint(latest)["semi_supervised"]["iteration"] == trainer.phase_starts[call // 3]

    torch.manual_seed(99)
    continued = tiny.bare_trainer("SelfTraining")
    continued.load_checkpoint(str(latest))
    continued.run_training()
    # 2 rounds of 3 cases; only the one in work when the process was killed is predicted again
    assert len(calls) == (7 if how == "killed" else 6)
    assert equal(weights(continued), expected)
    assert not options or equal(continued.teacher.network.state_dict(), average)
    assert [table(continued, number) for number in (0, 1)] == rows
    assert not list(Path(continued.output_folder).rglob(".tmp_*"))


def test_a_new_run_does_not_take_the_pseudo_labels_of_an_old_one(tiny):
    trainer = tiny.trainer("SelfTraining", **BUDGET)
    stale = trainer.pseudo_labels(0)
    stale.folder.mkdir(parents=True)
    for i in range(3):
        (stale.folder / f"unlabeled_{i}.b2nd").write_bytes(b"of another run")
    trainer.run_training()
    assert stale.facts("unlabeled_0").keys() == {"foreground", "estimated_dice"}


def test_a_lost_table_is_told_when_a_round_goes_on(tiny):
    trainer = tiny.trainer("SelfTraining", **BUDGET)
    trainer.iteration = trainer.phase_starts[0] + 1
    with pytest.raises(UserError, match="table of pseudo-labels is missing"):
        trainer.get_dataloaders()
