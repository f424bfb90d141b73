from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.engine.distributed import Ranks
from tests.support.tiny import Tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny(classes=3).write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def open_and_close(tiny: Tiny, **overrides) -> None:
    training, validation = tiny.trainer("Supervised", **overrides).get_dataloaders()
    training.close()
    validation.close()


def test_classes_that_are_often_seen_need_nothing(tiny, capsys):
    open_and_close(tiny)
    text = capsys.readouterr().out
    assert "rare classes" not in text
    assert "WARNING" not in text


def test_shares_are_in_the_log_file(tiny):
    trainer = tiny.trainer("Supervised")
    for stream in trainer.get_dataloaders():
        stream.close()
    with open(trainer.log_file) as file:
        assert "Labeled patches that show a class: class_1 100.0%, class_2 100.0%" in file.read()


def test_a_class_without_a_case_is_told(tiny, capsys):
    without_class(tiny, 2)
    open_and_close(tiny)
    assert "no labeled case of this fold has class class_2" in capsys.readouterr().out


def test_a_class_whose_label_stands_in_a_list_is_named(tiny, capsys):
    without_class(tiny, 2)
    labels = {"background": 0, "liver": 1, "tumor": [2]}
    (tiny.base / "dataset.json").write_text(json.dumps(tiny.dataset_json() | {"labels": labels}))
    open_and_close(tiny)
    assert "no labeled case of this fold has class tumor" in capsys.readouterr().out


def test_a_class_that_stays_rare_is_told(tiny, capsys):
    without_class(tiny, 2, cases=("labeled_1",))
    open_and_close(tiny, least_class_share=0.9)
    assert "class class_2 is in 50.0% of the labeled patches only" in capsys.readouterr().out


def test_the_check_can_be_left_out(tiny, capsys):
    without_class(tiny, 2)
    open_and_close(tiny, least_class_share=0.0)
    assert "WARNING" not in capsys.readouterr().out


def test_looking_at_patches_draws_nothing_from_the_training(tiny):
    np.random.seed(5)
    open_and_close(tiny)
    drawn = np.random.uniform()
    np.random.seed(5)
    open_and_close(tiny, least_class_share=0.0)
    assert np.random.uniform() == drawn


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_rare_classes_are_drawn_more_often_by_the_stream_of_a_trainer(tmp_path, monkeypatch, capsys, rank, size):
    data = Tiny(classes=3, labeled=4, labeled_batch=2).write(tmp_path, monkeypatch)
    without_class(data, 2, cases=("labeled_0", "labeled_1", "labeled_2"))
    shares = []
    for least in (0.0, 0.5):
        trainer = data.trainer("Supervised", least_class_share=least)
        trainer.batch_size, trainer.ranks = 2 // size, Ranks(rank, size, store=torch.distributed.HashStore())
        training, validation = trainer.get_dataloaders()
        found = [(next(training)["target"][0] == 2).flatten(1).any(1).float() for _ in range(80)]
        shares.append(float(torch.cat(found).mean()))
        training.close()
        validation.close()
    torch.use_deterministic_algorithms(False)
    # every patch of the one case in four shows the class; the second row of the whole batch is the centered one
    expected = {(0, 1): (0.25, 0.5), (0, 2): (0.25, 0.25), (1, 2): (0.25, 0.75)}[rank, size]
    assert shares == pytest.approx(expected, abs=0.13)
    assert ("rare classes are shown more often: class_2" in capsys.readouterr().out) == (rank == 0)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_makes_no_sense_is_refused(tiny, share):
    with pytest.raises(UserError, match="least_class_share"):
        tiny.trainer("Supervised", least_class_share=share).run_training()


def without_class(tiny: Tiny, label: int, cases: tuple[str, ...] = ("labeled_0", "labeled_1")) -> None:
    """Takes a class out of preprocessed labeled cases."""
    import blosc2
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

    folder = tiny.base / tiny.identifier
    for case in cases:
        segmentation = blosc2.open(str(folder / f"{case}_seg.b2nd"))[:]
        segmentation[segmentation == label] = 0
        (folder / f"{case}_seg.b2nd").unlink()
        blosc2.asarray(segmentation, urlpath=str(folder / f"{case}_seg.b2nd"))
        properties = load_pickle(str(folder / f"{case}.pkl"))
        properties["class_locations"][label] = []
        write_pickle(properties, str(folder / f"{case}.pkl"))
