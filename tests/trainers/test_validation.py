from __future__ import annotations

import json
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import blosc2
import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.engine import validation
from nnssl.trainers.engine.loop import _average_dice, _warn_of_unlearned
from tests.support.tiny import PLANS, Tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield lambda **options: Tiny(**options).write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [{}, {"classes": 3, "regions": True}, {"ignore": True}])
def test_validation_predicts_and_scores_the_cases_of_the_fold(tiny, options):
    trainer = tiny(**options).trainer("MeanTeacher", fold=0)
    trainer.perform_actual_validation(save_probabilities=True)
    folder = Path(trainer.output_folder, "validation")
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1
    assert (folder / "labeled_0.nii.gz").is_file()
    assert (folder / "labeled_0.npz").is_file()
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    assert trainer.network.decoder.deep_supervision, "validation must leave the network as it was"


def test_fold_all_has_nothing_to_validate(tiny, capsys):
    trainer = tiny().trainer("Supervised")
    trainer.perform_actual_validation()
    assert "no validation cases" in capsys.readouterr().out
    assert not Path(trainer.output_folder, "validation").exists()


def test_online_evaluation_scores_the_deployed_network(tiny):
    data = tiny()
    trainer = data.trainer("MeanTeacher", deploy="teacher")
    batch = data.batch()
    before = trainer.validation_step({"data": batch["data"], "target": [t.clone() for t in batch["target"]]})
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.add_(1.0)
    after = trainer.validation_step({"data": batch["data"], "target": [t.clone() for t in batch["target"]]})
    assert before["loss"] == after["loss"]
    assert not trainer.teacher.network.decoder.deep_supervision


def test_first_stage_of_a_cascade_predicts_for_the_next(tiny):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    data = tiny(cascade=True)
    lowres = data.bare_trainer("Supervised", fold=0, configuration="3d_lowres")
    lowres.initialize()
    lowres.perform_actual_validation()
    folder = Path(lowres.output_folder_base, "predicted_next_stage", "3d_cascade_fullres")
    assert (folder / "labeled_0.b2nd").is_file()

    second = data.bare_trainer("Supervised", fold=0)
    assert second.is_cascaded
    cases = nnUNetDatasetBlosc2(str(data.base / data.identifier), ["labeled_0"], str(folder))
    assert cases.load_case("labeled_0")[2] is not None


class Pool:
    """Does the work when it is asked for the result, and counts the results that it owes."""

    def __init__(self):
        self.owed = self.most_owed = 0

    def submit(self, function, *arguments):
        self.owed += 1
        self.most_owed = max(self.most_owed, self.owed)
        return SimpleNamespace(result=lambda: self._done(function, arguments))

    def _done(self, function, arguments):
        self.owed -= 1
        return function(*arguments)


@pytest.fixture
def at_once(monkeypatch):
    """The network takes no time, and two processes write."""
    monkeypatch.setattr(validation, "predict_logits", lambda predictor, image: torch.zeros((2, *image.shape[1:])))
    monkeypatch.setattr(validation, "_export_processes", lambda cases, ranks: 2)


def test_the_network_waits_for_the_export(tiny, at_once, monkeypatch, tmp_path):
    trainer, pool = tiny(labeled=8).trainer("Supervised", fold=0), Pool()

    @contextmanager
    def worker_pool(processes):
        yield pool

    monkeypatch.setattr(validation, "worker_pool", worker_pool)
    cases = [f"labeled_{number}" for number in range(8)]
    assert validation._predict_cases(trainer, cases, tmp_path, False) == cases
    assert pool.most_owed == 5  # two more than processes, and the one that is handed over
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == [f"{case}.nii.gz" for case in cases]


def test_processes_write_what_this_one_writes(tiny, monkeypatch, tmp_path):
    trainer = tiny(cascade=True, labeled=3).bare_trainer("Supervised", fold=0, configuration="3d_lowres")
    trainer.initialize()
    next_stage = Path(trainer.output_folder_base, "predicted_next_stage", "3d_cascade_fullres", "labeled_1.b2nd")
    written = []
    for processes in (1, 2):
        monkeypatch.setattr(validation, "_export_processes", lambda cases, ranks, processes=processes: processes)
        validation._predict_cases(trainer, ["labeled_1"], tmp_path, False)
        mask = tmp_path / "labeled_1.nii.gz"
        written.append((mask.read_bytes(), blosc2.open(str(next_stage))[:]))
        mask.unlink()
        next_stage.unlink()
    assert written[0][0] == written[1][0]
    assert (written[0][1] == written[1][1]).all()


def test_a_killed_export_process_is_told_with_its_cases(tiny, at_once, monkeypatch, tmp_path):
    trainer = tiny(labeled=3).trainer("Supervised", fold=0)
    monkeypatch.setattr(validation, "export_prediction_from_logits", _kill_this_process)
    with pytest.raises(UserError, match="background process was killed during the export") as caught:
        validation._predict_cases(trainer, ["labeled_0", "labeled_2"], tmp_path, False)
    assert str(caught.value.where) == "one of the cases labeled_0, labeled_2"


def _kill_this_process(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_case_that_cannot_be_written_is_named(tiny, monkeypatch):
    trainer = tiny().trainer("Supervised", fold=0)

    def export(*arguments):
        raise ValueError("no such format")

    monkeypatch.setattr(validation, "export_prediction_from_logits", export)
    with pytest.raises(RuntimeError, match="prediction of case labeled_0 cannot be written: no such format"):
        trainer.perform_actual_validation()


def test_online_evaluation_changes_no_network(tiny):
    data = tiny()
    plans = json.loads((data.base / f"{PLANS}.json").read_text())
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    (data.base / f"{PLANS}.json").write_text(json.dumps(plans))
    trainer = data.trainer("CPS", deploy="mean")
    trainer.network.train()
    before = {key: value.clone() for key, value in trainer.deployed_network().state_dict().items()}
    trainer.on_validation_epoch_start()
    batch = data.batch()
    with torch.no_grad():
        trainer.validation_step({"data": batch["data"], "target": batch["target"]})
    after = trainer.deployed_network().state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert trainer.second.training


def test_the_average_of_the_pseudo_dice_begins_anew_with_a_phase(tiny):
    trainer = tiny().trainer("SelfTraining", rounds=2, num_epochs=4, num_iterations_per_epoch=4, round_shares=(5, 11))
    assert trainer.phase_starts == (5,)
    values = [0.8, 0.9, 0.1, 0.5]
    found = []
    for epoch, value in enumerate(values):
        trainer.logger.log("mean_fg_dice", value, epoch)
        trainer.iteration = 4 * (epoch + 1)
        found.append(_average_dice(trainer))
    # the epoch in which the phase began belongs to neither
    assert found == [0.8, None, 0.1, pytest.approx(0.14)]
    assert trainer.logger.get_value("ema_fg_dice", 0) == 0.8


@pytest.mark.parametrize(
    ("dice", "told"), [([0.0, 0.3], "class_1"), ([0.0, 0.0], "class_1, class_2"), ([0.1, float("nan")], None)]
)
def test_classes_that_were_not_learned_are_named(tiny, capsys, dice, told):
    trainer = tiny(classes=3).trainer("Supervised")
    capsys.readouterr()
    _warn_of_unlearned(trainer)
    assert not capsys.readouterr().out, "nothing has been validated yet"
    trainer.current_epoch = 1
    trainer.logger.log("dice_per_class_or_region", dice, 0)
    _warn_of_unlearned(trainer)
    out = capsys.readouterr().out
    assert f"not learned: {told} (Dice 0" in out if told else not out


@pytest.mark.parametrize(
    ("name", "told_after"),
    # its student has not begun where the teacher's phase ends
    [("BCP", [4, 8]), ("SelfTraining", [4, 8]), ("ReciprocalLearning", [8]), ("Supervised", [8])],
)
def test_the_end_of_each_phase_tells_what_was_not_learned(name, told_after, tiny, monkeypatch, capsys):
    phases = {"SelfTraining": {"rounds": 2}, "Supervised": {}}.get(name, {"pretrain_share": 0.5})
    data = tiny(labeled=2, labeled_batch=2)
    trainer = data.trainer(name, num_epochs=4, num_iterations_per_epoch=2, **phases)

    def nothing_found(outputs):
        for metric in ("mean_fg_dice", "val_losses"):
            trainer.logger.log(metric, 0.0, trainer.current_epoch)
        trainer.logger.log("dice_per_class_or_region", [0.0], trainer.current_epoch)

    monkeypatch.setattr(trainer, "on_validation_epoch_end", nothing_found)
    trainer.run_training()
    out = capsys.readouterr().out
    assert [int(steps) for steps in re.findall(r"after (\d+) steps not learned: class_1", out)] == told_after
