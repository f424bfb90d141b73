from __future__ import annotations

import csv
import math
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl.dataloading.pseudo_labeled import PseudoLabels
from nnssl.errors import UserError
from nnssl.inference.uncertainty import estimated_dice, values_by_channel
from nnssl.networks.unwrap import set_deep_supervision
from nnssl.trainers.engine import pseudo_labeling
from nnssl.trainers.engine.distributed import Ranks
from nnssl.trainers.engine.pipelines import unlabeled_images
from nnssl.trainers.engine.pseudo_labeling import predict_unlabeled, stability_table, used_cases, write_table
from nnssl.trainers.engine.run_settings import RunSettings
from tests.support.tiny import DEVICE, Tiny

CASES = ["unlabeled_0", "unlabeled_1", "unlabeled_2"]


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def never() -> bool:
    return False


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"dimensions": 2, "channels": 2, "classes": 3}, {"regions": True, "classes": 3, "ignore": True}],
    ids=["3D", "2D", "regions"],
)
def test_pseudo_labels_are_those_of_nnunets_predictor(options, mirrored, tmp_path, monkeypatch):
    trainer = Tiny(**options, unlabeled=1).write(tmp_path, monkeypatch).bare_trainer("SelfTraining")
    exact = RunSettings(seed=0, deterministic=True, precision="fp32", memory_format="contiguous")
    trainer.configure({"mirror_axes": (0,), "mirrored_pseudo_labels": mirrored}, exact)
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    store = PseudoLabels(tmp_path / "labels")
    assert predict_unlabeled(trainer, store, None, never)

    predictor = nnUNetPredictor(
        use_mirroring=mirrored, perform_everything_on_device=False, device=DEVICE, allow_tqdm=False
    )
    set_deep_supervision(trainer.network, False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "nnUNetTrainer",
        (0,),
    )
    image, _ = unlabeled_images(trainer).load_case("unlabeled_0")
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image[:]))
    expected = trainer.label_manager.convert_logits_to_segmentation(logits).numpy()
    labels = store.labels("unlabeled_0")[:]
    assert labels.shape == (1, *image.shape[1:])
    assert len(np.unique(expected)) > 1
    assert np.array_equal(labels[0], expected)
    facts = store.facts("unlabeled_0")
    assert facts["foreground"] == np.count_nonzero(labels > 0)
    probabilities = trainer.label_manager.apply_inference_nonlin(logits).numpy()
    estimate = estimated_dice(probabilities, expected, values_by_channel(trainer.label_manager))
    assert facts["estimated_dice"] == pytest.approx(estimate)


def test_background_outside_the_mask_is_marked_where_normalization_needs_it(tmp_path, monkeypatch):
    trainer = Tiny(masked=True, unlabeled=1).write(tmp_path, monkeypatch).trainer("SelfTraining", mirror_axes=())
    store = PseudoLabels(tmp_path / "labels")
    predict_unlabeled(trainer, store, None, never)
    labels = store.labels("unlabeled_0")[0]
    assert (labels[:, :4] != 0).all()
    assert (labels[:, :4] == -1).any()
    assert (labels[:, 4:] >= 0).all()


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A trainer whose predictions are made without a network, and what they are asked for."""
    trainer = Tiny().write(tmp_path, monkeypatch).trainer("SelfTraining")
    asked = []

    def predict(predictor, image):
        asked.append(float(image.sum()))
        logits = torch.zeros(2, *image.shape[1:])
        logits[1, : len(asked)] = 1
        return logits

    monkeypatch.setattr(pseudo_labeling, "predict_logits", predict)
    return trainer, asked


def test_a_stop_request_ends_after_the_case_in_work_and_nothing_is_done_twice(counted, tmp_path):
    trainer, asked = counted
    store = PseudoLabels(tmp_path / "labels")
    assert not predict_unlabeled(trainer, store, None, lambda: len(asked) == 2)
    assert [case in store for case in CASES] == [True, True, False]
    assert predict_unlabeled(trainer, store, None, never)
    assert predict_unlabeled(trainer, store, None, never)
    assert [case in store for case in CASES] == [True, True, True]
    assert len(asked) == len(set(asked)) == 3


def test_changes_since_the_round_before_are_counted(counted, tmp_path):
    trainer, _ = counted
    before, after = PseudoLabels(tmp_path / "before"), PseudoLabels(tmp_path / "after")
    predict_unlabeled(trainer, before, None, never)
    (before.folder / "unlabeled_2.b2nd").unlink()
    predict_unlabeled(trainer, after, before, never)
    plane, planes = 20 * 20, after.labels("unlabeled_0").shape[1]
    sure = np.e / (1 + np.e)

    def facts(marked: int) -> dict[str, float]:
        """Of a case with that many planes marked; in the others both classes are equally likely."""
        dice = 2 * marked * sure / (marked + marked * sure + (planes - marked) / 2)
        return {"foreground": marked * plane, "estimated_dice": pytest.approx(dice)}

    # call n marks n planes: 1, 2, 3 before and 4, 5, 6 after
    assert after.facts("unlabeled_0") == facts(4) | {"changed": 3 * plane}
    assert after.facts("unlabeled_1") == facts(5) | {"changed": 3 * plane}
    assert after.facts("unlabeled_2") == facts(6)
    assert [row["estimated_dice"] for row in stability_table([before, after], CASES, 0)] == [
        facts(marked)["estimated_dice"] for marked in (4, 5, 6)
    ]


def test_nothing_in_a_case_has_no_estimate(counted, tmp_path, monkeypatch):
    trainer, _ = counted
    monkeypatch.setattr(pseudo_labeling, "predict_logits", lambda _, image: torch.zeros(2, *image.shape[1:]))
    store = PseudoLabels(tmp_path / "labels")
    predict_unlabeled(trainer, store, None, never)
    assert store.facts("unlabeled_0") == {"foreground": 0, "estimated_dice": None}
    write_table(stability_table([store], CASES, 0), tmp_path / "stability.csv")
    assert used_cases(tmp_path / "stability.csv") == CASES


def write_facts(store: PseudoLabels, trainer, facts: dict[str, dict[str, Any]]) -> PseudoLabels:
    for case, numbers in facts.items():
        store.write(case, np.zeros((1, 4, 4, 4), np.int8), trainer.label_manager, (4, 4, 4), numbers)
    return store


def test_the_table_says_which_cases_are_left_out_and_why(counted, tmp_path):
    trainer, _ = counted
    rounds = [
        write_facts(PseudoLabels(tmp_path / "0"), trainer, {case: {"foreground": 10} for case in "abcd"}),
        write_facts(
            PseudoLabels(tmp_path / "1"),
            trainer,
            {case: {"foreground": 10, "changed": changed} for case, changed in zip("abcd", (1, 9, 5, 2), strict=True)},
        ),
        write_facts(
            PseudoLabels(tmp_path / "2"),
            trainer,
            {
                "a": {"foreground": 10, "changed": 1},
                "b": {"foreground": 10, "changed": 2},
                "c": {"foreground": 5, "changed": 4},
                "d": {"foreground": 0, "changed": 3},
                "new": {"foreground": 8},
            },
        ),
    ]
    first = stability_table(rounds[:1], "abcd", 0.5)
    assert [(row["used"], row["reason"]) for row in first] == [("yes", "predicted once, cannot be judged yet")] * 4

    rows = {row["case"]: row for row in stability_table(rounds, [*"abcd", "new"], 0.5)}
    # means of two rounds: 0.1, (0.9 + 0.2) / 2, (0.5 + 0.8) / 2, infinite
    means = [rows[case]["mean_instability"] for case in "abcd"]
    assert means == pytest.approx([0.1, 0.55, 0.65, math.inf])
    assert [row["used"] for row in rows.values()] == ["yes", "yes", "no", "no", "yes"]
    assert rows["c"]["reason"] == "one of the 2 least stable of 4 cases"
    assert rows["a"]["reason"] == ""
    assert "judged" in rows["new"]["reason"]
    assert (rows["c"]["foreground_voxels"], rows["c"]["changed_voxels"], rows["c"]["instability"]) == (5, 4, 0.8)

    file = tmp_path / "stability.csv"
    write_table(list(rows.values()), file)
    assert used_cases(file) == ["a", "b", "new"]
    with open(file, newline="") as stream:
        assert [row["case"] for row in csv.DictReader(stream)] == [*"abcd", "new"]


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(UserError, match="table of pseudo-labels is missing"):
        used_cases(tmp_path / "stability.csv")


def test_when_one_rank_wishes_to_stop_no_rank_is_dealt_more():
    store = torch.distributed.HashStore()
    first, second = (Ranks(rank, 2, rank, 2, store) for rank in range(2))
    stop = []
    one = first.deal(["a", "b", "c", "d"], lambda: bool(stop))
    two = second.deal(["a", "b", "c", "d"])
    assert [next(one), next(two)] == ["a", "b"]
    stop.append(True)
    assert list(one) == []
    assert list(two) == []


def test_cases_of_low_estimated_dice_are_left_out_first(counted, tmp_path):
    trainer, _ = counted
    facts = {
        "a": {"foreground": 100, "estimated_dice": 0.9, "changed": 5},
        "b": {"foreground": 100, "estimated_dice": 0.6, "changed": 90},
        "c": {"foreground": 100, "estimated_dice": 0.8, "changed": 50},
        "d": {"foreground": 0, "estimated_dice": None, "changed": 0},
    }
    first = {case: {name: row[name] for name in ("foreground", "estimated_dice")} for case, row in facts.items()}
    rounds = [
        write_facts(PseudoLabels(tmp_path / str(number)), trainer, known) for number, known in enumerate((first, facts))
    ]
    rows = {row["case"]: row for row in stability_table(rounds[:1], "abcd", 0.5, 0.5)}
    assert [row["used"] for row in rows.values()] == ["yes", "no", "yes", "no"]
    assert rows["b"]["reason"] == rows["d"]["reason"] == "one of the 2 of 4 cases with the lowest estimated Dice"
    assert rows["d"]["estimated_dice"] == ""
    # a share that is rounded up, then the least stable of those that are left
    rows = {row["case"]: row for row in stability_table(rounds, "abcd", 0.4, 0.7)}
    assert [row["used"] for row in rows.values()] == ["yes", "no", "yes", "no"]
    assert rows["b"]["reason"] == "one of the 1 least stable of 3 cases"
