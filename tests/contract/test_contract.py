"""What every registered trainer must hold; a new one is tested the day it is added."""

from __future__ import annotations

import builtins
import io
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl.errors import UserError
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.device_memory import footprint
from nnssl.trainers.engine.micro_batch import check_micro_batch, obstacle_to_parts
from nnssl.trainers.engine.rehearsal import rehearse
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.settings import hyperparameters
from nnssl.trainers.registry import registered_trainers, trainer_names
from tests.support.host import reads_of_values
from tests.support.tiny import DEVICE

NAMES = trainer_names()
SEMI_SUPERVISED = [name for name, trainer in registered_trainers().items() if trainer.uses_unlabeled]
PLAIN_SUPERVISION = [name for name in SEMI_SUPERVISED if registered_trainers()[name].plain_supervision]


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _all_weights(trainer: Any) -> dict[str, torch.Tensor]:
    states = {"student": unwrap(trainer.network), **trainer._modules}
    return {f"{name}.{key}": value for name, module in states.items() for key, value in _weights(module).items()}


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_unsupervised_terms_change_the_student(name, tiny):
    data = tiny()
    trainer = data.trainer(name)
    trainer.train_step(data.batch(0))
    step = trainer.make_step(data.batch(1))
    trainer.prepare_step(step)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.forward(step)
    terms = trainer.unsupervised_loss(step)
    assert terms, "a semi-supervised method must return at least one unsupervised term"
    sum(terms.values()).backward()
    gradients = [p.grad for p in unwrap(trainer.network).parameters() if p.grad is not None]
    assert gradients
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_student_depends_on_the_unlabeled_patches(name, tiny):
    data = tiny()
    ends = []
    for scale in (1.0, 3.0):
        trainer = data.trainer(name)
        for seed in range(trainer.pretrain_steps + 2):
            batch = data.batch(seed)
            batch["unlabeled"] = batch["unlabeled"] * scale
            trainer.train_step(batch)
        ends.append(_weights(unwrap(trainer.network)))
    assert not _equal(*ends)


@pytest.mark.parametrize("name", PLAIN_SUPERVISION)
def test_without_its_unsupervised_terms_a_step_is_the_supervised_step(name, tiny, monkeypatch):
    """To the bit: the same weights, the same patches in one pass, the unsupervised terms multiplied by zero.

    Both students see labeled and unlabeled patches: convolution kernels round differently for another batch size, so
    the pass over labeled patches alone agrees to rounding only.
    """
    data = tiny()
    # methods of several phases warm up in each
    reference = data.trainer("Supervised", warmup_steps=0)
    trainer = data.trainer(name, **registered_trainers()[name].supervised_with, warmup_steps=0)
    assert _equal(_weights(unwrap(reference.network)), _weights(unwrap(trainer.network)))
    monkeypatch.setattr(trainer, "prepare_step", lambda step: None)
    terms = trainer.unsupervised_loss
    monkeypatch.setattr(trainer, "unsupervised_loss", lambda step: {k: v * 0.0 for k, v in terms(step).items()})
    alone = data.trainer("Supervised", warmup_steps=0).train_step(data.batch(0) | {"unlabeled": None})
    for seed in range(3):
        supervised = reference.train_step(data.batch(seed))
        losses = trainer.train_step(data.batch(seed))
        assert torch.equal(losses["loss"], supervised["loss"])
        if seed == 0:
            torch.testing.assert_close(supervised["loss"], alone["loss"], rtol=1e-4, atol=1e-5)
    assert _equal(_weights(unwrap(reference.network)), _weights(unwrap(trainer.network)))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_for_the_device(name, tiny, monkeypatch):
    data = tiny()
    # connected components are found on the host, which methods that want them say
    known = hyperparameters(registered_trainers()[name])
    trainer = data.trainer(name, **({"largest_component": "off"} if "largest_component" in known else {}))
    batches = [data.batch(seed) for seed in range(4)]
    trainer.train_step(batches[0])
    with reads_of_values(monkeypatch) as found:
        for batch in batches[1:]:  # in both phases
            trainer.meter.add(trainer.train_step(batch))
    assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_no_label_of_an_unlabeled_case_is_opened(name, tiny, monkeypatch):
    data = tiny()
    poison = data.base / f"{data.identifier}_unlabeled"
    for case in [f"unlabeled_{i}" for i in range(data.unlabeled)]:
        (poison / f"{case}_seg.b2nd").write_bytes(b"poison")
        (data.base / "gt_segmentations" / f"{case}.nii.gz").write_bytes(b"poison")
        (poison / f"{case}.pkl").write_bytes(b"poison")
    opened: list[str] = []
    _trace_opens(monkeypatch, opened)
    trainer = data.trainer(name, num_epochs=1)
    trainer.run_training()
    assert any("labeled_0" in path for path in opened), "the trace itself must work"
    touched = [p for p in opened if "unlabeled_" in Path(p).name and not p.endswith((".b2nd", "_mask.b2nd"))]
    touched += [p for p in opened if Path(p).name.startswith("unlabeled_") and p.endswith("_seg.b2nd")]
    assert touched == []


def _trace_opens(monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    import blosc2

    real_open, real_blosc = builtins.open, blosc2.open

    def traced(file, *args, **kwargs):
        opened.append(os.fspath(file) if not isinstance(file, int) else "")
        return real_open(file, *args, **kwargs)

    def traced_blosc(urlpath, *args, **kwargs):
        opened.append(os.fspath(urlpath))
        return real_blosc(urlpath, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", traced)
    monkeypatch.setattr(io, "open", traced)
    monkeypatch.setattr(blosc2, "open", traced_blosc)


@pytest.mark.parametrize("name", NAMES)
def test_teachers_follow_by_averaging_only(name, tiny, monkeypatch):
    data = tiny()
    trainer = data.trainer(name)
    teachers = {key: module for key, module in trainer._modules.items() if isinstance(module, EMATeacher)}
    trainer.train_step(data.batch(0))
    before = {key: _weights(module) for key, module in teachers.items()}
    monkeypatch.setattr(EMATeacher, "update", lambda self, student, decay: None)
    trainer.train_step(data.batch(1))
    for key, module in teachers.items():
        assert not any(p.requires_grad for p in module.parameters())
        assert _equal(before[key], _weights(module))


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_training(name, tiny):
    data = tiny()
    ends = []
    for _ in range(2):
        trainer = data.trainer(name)
        trainer.run_training()
        ends.append(_all_weights(trainer))
        _forget_run(trainer)
    assert _equal(*ends)


@pytest.mark.parametrize("cut", [2, 3], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_training_ends_as_the_undisturbed_one(name, cut, tiny, monkeypatch):
    data = tiny()
    whole = data.trainer(name, num_epochs=3)
    whole.run_training()
    expected = _all_weights(whole)
    _forget_run(whole)

    first = data.trainer(name, num_epochs=3)
    _stop_after(first, cut, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        first.run_training()
    assert stopped.value.code in (0, None)
    torch.manual_seed(999)

    second = data.bare_trainer(name)
    second.load_checkpoint(str(Path(second.output_folder, "checkpoint_latest.pth")))
    assert second.iteration == cut
    second.run_training()
    assert second.iteration == whole.iteration
    assert _equal(expected, _all_weights(second))
    assert [row["loss"] for row in second.history.rows] == [row["loss"] for row in whole.history.rows]


def _stop_after(trainer: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.train_step

    def train_step(batch):
        losses = real(batch)
        if trainer.iteration == steps:
            Path(trainer.output_folder, "stop").touch()
        return losses

    monkeypatch.setattr(trainer, "train_step", train_step)


def _forget_run(trainer: Any) -> None:
    shutil.rmtree(trainer.output_folder)


@pytest.mark.parametrize(
    "options",
    [
        {"dimensions": 2, "channels": 2, "classes": 3},
        {"dimensions": 3, "channels": 2, "classes": 5},
        {"dimensions": 3, "masked": True},
        {"dimensions": 3, "labeled_batch": 2, "unlabeled_batch": 1},
    ],
    ids=["2D", "5 classes", "mask for normalization", "more labeled than unlabeled"],
)
@pytest.mark.parametrize("name", NAMES)
def test_trains_on(name, options, tiny):
    trainer = tiny(**options).trainer(name, num_epochs=1)
    before = _weights(unwrap(trainer.network))
    trainer.run_training()
    assert not _equal(before, _weights(unwrap(trainer.network)))
    assert math.isfinite(trainer.history.rows[-1]["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_trains_with_and_without_the_regional_switch(name, tiny):
    data = tiny(labeled=3)
    for augmentation in ("regional_switch", "none"):
        settings = {"discriminator_rows": "all"} if name == "SASSNet" and augmentation != "none" else {}
        trainer = data.trainer(name, num_epochs=1, atlas_augmentation=augmentation, **settings)
        trainer.run_training()
        assert math.isfinite(trainer.history.rows[-1]["loss"])
        _forget_run(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_impossible_numbers_are_refused_before_the_first_step(name, tiny):
    data = tiny(labeled=3)
    for setting, default in hyperparameters(registered_trainers()[name]).items():
        for value in (math.nan, math.inf, -1.0) if isinstance(default, float) else ():
            if setting == "gradient_clipping" and value == math.inf:
                continue  # no clipping
            trainer = data.bare_trainer(name)
            trainer.configure({setting: value}, RunSettings(seed=0))
            with pytest.raises(UserError, match=setting):
                check_requirements(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_trains_without_deep_supervision(name, tiny):
    trainer = tiny().trainer(name, num_epochs=1, enable_deep_supervision=False)
    trainer.run_training()
    assert trainer.iteration == 2


@pytest.mark.parametrize(
    "options", [{"regions": True, "classes": 3}, {"ignore": True}, {"regions": True, "classes": 3, "ignore": True}],
    ids=["regions", "ignore", "regions and ignore"],
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_special_labels_work_or_are_refused_before_the_first_step(name, options, tiny):
    trainer = tiny(**options).trainer(name, num_epochs=1)
    asked = (("regions", trainer.supports_regions), ("ignore", trainer.supports_ignore_label))
    if all(able for option, able in asked if options.get(option)):
        trainer.run_training()
        assert trainer.iteration == 2
    else:
        with pytest.raises(NotImplementedError):
            trainer.run_training()
        assert trainer.iteration == 0


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_cascade_is_refused_unless_supported(name, tiny):
    trainer = tiny(cascade=True).bare_trainer(name)
    if trainer.supports_cascade:
        first_stage = Path(trainer.folder_with_segs_from_previous_stage)
        first_stage.mkdir(parents=True)
        for case in trainer.split().train:
            (first_stage / f"{case}.b2nd").touch()
        check_requirements(trainer)
        assert trainer.is_cascaded
    else:
        with pytest.raises(NotImplementedError, match="cascade"):
            check_requirements(trainer)


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_change_no_gradient(name, dimensions, deep_supervision, tiny):
    """In 2D with Dice over the batch, which is no mean over patches."""
    data = tiny(dimensions=dimensions, labeled_batch=3, unlabeled_batch=3)
    found = []
    for size in (None, 2):
        trainer = data.trainer(name, enable_deep_supervision=deep_supervision)
        if obstacle_to_parts(trainer) is not None:
            trainer.settings.micro_batch = 2
            with pytest.raises(UserError, match="micro-batches would change the result"):
                check_micro_batch(trainer)
            return
        trainer.settings.micro_batch = size
        losses = trainer.train_step(data.batch())
        gradients = {key: p.grad for key, p in unwrap(trainer.network).named_parameters() if p.grad is not None}
        found.append((losses, gradients))
    # CUDA computes in fp16 here
    rtol, atol = (1e-3, 1e-5) if DEVICE.type == "cpu" else (1e-2, 1e-3)
    torch.testing.assert_close(*found, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_a_step_can_be_estimated(name, tiny):
    trainer = tiny(labeled_batch=2).trainer(name)
    weights = _all_weights(trainer)
    estimate = rehearse(trainer)
    assert estimate.held == sum(
        footprint(DEVICE.type)(tensor.nbytes)
        for module in (unwrap(trainer.network), *trainer._modules.values())
        for tensor in (*module.parameters(), *module.buffers())
    )
    assert estimate.total > 2 * estimate.held
    assert _equal(weights, _all_weights(trainer))


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_a_phantom(name, tiny):
    # methods that begin anew with other data inside a run are followed through one training here
    continuous = {"warm_start": True} if "warm_start" in hyperparameters(registered_trainers()[name]) else {}
    # nnU-Net's weights in the loss, which is above 0 with them
    plain = {"optimizer_name": "AdamW", "initial_lr": 2e-3, "weight_decay": 0.01}
    budget = {"num_epochs": 2, "num_iterations_per_epoch": 12}
    trainer = tiny(labeled_batch=2).trainer(name, **budget, **continuous, **plain)
    trainer.run_training()
    first, last = trainer.history.rows
    assert last["supervised"] < 0.8 * first["supervised"]


@pytest.mark.parametrize("name", NAMES)
def test_deployed_network_predicts_through_the_stock_predictor(name, tiny):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnssl.inference.checkpoint import read_model_checkpoint
    from nnssl.inference.network import build_network

    trainer = tiny().trainer(name, num_epochs=1)
    trainer.run_training()
    weights = read_model_checkpoint(Path(trainer.output_folder, "checkpoint_final.pth"))["network_weights"]
    manager = trainer.configuration_manager
    if trainer.deploys_ensemble:
        network = build_network(type(trainer), trainer.plans_manager, manager, trainer.dataset_json, weights)
    else:
        network = nnUNetTrainer.build_network_architecture(trainer.plans_manager, manager, 1, 2, False)
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.manual_initialization(
        network, trainer.plans_manager, manager, [weights], trainer.dataset_json, "nnUNetTrainer", None
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 20, 20, 20))
    assert logits.shape == (2, 20, 20, 20)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_declares_its_source(name):
    trainer = registered_trainers()[name]
    assert trainer.source
    assert 2000 < trainer.year < 2100
    assert trainer.__doc__
