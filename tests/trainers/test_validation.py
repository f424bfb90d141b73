from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.tiny import Tiny


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
