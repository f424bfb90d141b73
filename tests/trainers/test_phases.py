"""Steps before the main phase, and optimizers beside the student's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from nnssl.trainers import registry
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.schedule import update_learning_rates
from tests.support.tiny import Tiny


class TwoNetworks(SemiSupervisedTrainer):
    """A second network with an optimizer of its own, and a probe whose learning rate stays."""

    uses_unlabeled = False
    restarts_schedule = True

    second: nn.Module
    probe: nn.Module

    def build_modules(self):
        return {"second": self.new_network(), "probe": nn.Linear(1, 1)}

    def build_optimizers(self):
        fixed = {"params": list(self.probe.parameters()), "lr": 0.5, "scheduled": False}
        return {"second": self.new_optimizer(self.second.parameters()), "probe": torch.optim.SGD([fixed])}

    def unsupervised_loss(self, step):
        return {"second": self.segmentation_loss(self.heads(self.second, step.labeled), step.target)}

    def backward_and_update(self, loss, *optimizers):
        super().backward_and_update(loss, self.optimizer, self._optimizers["second"])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._registered, "TwoNetworks", TwoNetworks)
    yield Tiny().write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("share", "epochs", "expected"), [(0.0, 2, 0), (0.25, 2, 1), (0.01, 2, 1), (0.999, 2, 3), (0.5, 10, 10)]
)
def test_length_of_the_first_phase(tiny, share, epochs, expected):
    trainer = tiny.trainer("MeanTeacher", pretrain_share=share, num_epochs=epochs, num_iterations_per_epoch=2)
    assert trainer.pretrain_steps == expected
    assert trainer.progress == 0
    assert trainer.pretraining == (expected > 0)
    trainer.iteration = 2 * epochs
    assert trainer.progress == 1
    assert not trainer.pretraining


def test_progress_runs_from_0_to_1_within_the_main_phase(tiny):
    trainer = tiny.trainer("MeanTeacher", pretrain_share=0.5, num_epochs=4, num_iterations_per_epoch=2)
    seen = []
    for trainer.iteration in range(9):
        seen.append(trainer.progress)
    assert seen == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1]


def test_the_first_phase_trains_on_labeled_patches_and_the_teacher_then_starts_from_the_student(tiny):
    trainer = tiny.trainer("MeanTeacher", pretrain_share=0.5)
    reference = tiny.trainer("Supervised")
    for seed in range(2):
        losses = trainer.train_step(tiny.batch(seed))
        assert set(losses) == {"loss", "supervised"}
        reference.train_step(tiny.batch(seed) | {"unlabeled": None})
    assert equal(weights(trainer.network), weights(reference.network))
    seen = {}
    prepare = trainer.prepare_step

    def spy(step):
        seen["equal"] = equal(weights(trainer.teacher.network), weights(unwrap(trainer.network)))
        prepare(step)

    trainer.prepare_step = spy
    assert set(trainer.train_step(tiny.batch(2))) == {"loss", "supervised", "consistency"}
    assert seen["equal"]


def test_a_share_of_all_steps_is_refused(tiny):
    with pytest.raises(UserError, match="pretrain_share"):
        tiny.trainer("MeanTeacher", pretrain_share=1.0).run_training()


def test_each_optimizer_trains_its_own_parameters(tiny):
    trainer = tiny.trainer("TwoNetworks")
    assert len(trainer.optimizer.param_groups) == 1
    assert not equal(weights(trainer.second), weights(unwrap(trainer.network)))
    before = [weights(m) for m in (unwrap(trainer.network), trainer.second, trainer.probe)]
    trainer.train_step(tiny.batch(0) | {"unlabeled": None})
    after = [weights(m) for m in (unwrap(trainer.network), trainer.second, trainer.probe)]
    assert [equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_learning_rates_follow_the_students_and_start_again_with_the_main_phase(tiny):
    trainer = tiny.trainer("TwoNetworks", num_epochs=4, num_iterations_per_epoch=2, pretrain_share=0.5)
    rates = []
    for trainer.iteration in (0, 2, 4, 6):
        trainer.current_epoch = trainer.iteration // 2
        update_learning_rates(trainer)
        optimizers = (trainer.optimizer, *trainer._optimizers.values())
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    full = trainer.initial_lr
    half = full * 0.5**0.9
    expected = [[full, full, 0.5], [half, half, 0.5]]
    for row, wanted in zip(rates, expected * 2, strict=True):
        assert row == pytest.approx(wanted)


def test_other_optimizers_and_phases_are_continued_exactly(tiny):
    options = {"num_epochs": 3, "pretrain_share": 0.5}
    whole = tiny.trainer("TwoNetworks", **options)
    for seed in range(5):
        whole.train_step(tiny.batch(seed) | {"unlabeled": None})
    first = tiny.trainer("TwoNetworks", **options)
    for seed in range(3):
        first.train_step(tiny.batch(seed) | {"unlabeled": None})
    file = Path(first.output_folder, "checkpoint_latest.pth")
    first.save_checkpoint(str(file))
    second = tiny.bare_trainer("TwoNetworks")
    second.load_checkpoint(str(file))
    for seed in range(3, 5):
        second.train_step(tiny.batch(seed) | {"unlabeled": None})
    assert equal(weights(second.second), weights(whole.second))
    assert equal(weights(unwrap(second.network)), weights(unwrap(whole.network)))


def test_learning_rates_rise_in_the_first_steps(tiny):
    trainer = tiny.trainer("TwoNetworks", warmup_steps=4, num_iterations_per_epoch=10)
    rates = []
    for seed in range(6):
        trainer.train_step(tiny.batch(seed))
        rates.append([group["lr"] for optimizer in optimizers(trainer) for group in optimizer.param_groups])
    full = [trainer.initial_lr, trainer.initial_lr]
    for i, share in enumerate((0.25, 0.5, 0.75, 1.0, 1.0, 1.0)):
        assert rates[i] == pytest.approx([share * full[0], share * full[1], 0.5])


@pytest.mark.parametrize(("power", "expected"), [(0.0, [1, 1, 1, 1]), (1.0, [1, 0.75, 0.5, 0.25])])
def test_power_of_the_decay(tiny, power, expected):
    trainer = tiny.trainer("TwoNetworks", lr_decay_power=power, num_epochs=4, num_iterations_per_epoch=1)
    for epoch, share in enumerate(expected):
        trainer.current_epoch = epoch
        update_learning_rates(trainer)
        rates = [group["lr"] for optimizer in optimizers(trainer) for group in optimizer.param_groups]
        assert rates == pytest.approx([share * trainer.initial_lr, share * trainer.initial_lr, 0.5])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_decay_in_every_step(tiny, share):
    trainer = tiny.trainer("Supervised", lr_decay_per_step=True, num_epochs=2, num_iterations_per_epoch=4)
    type(trainer).restarts_schedule, restarts = True, type(trainer).restarts_schedule
    trainer.pretrain_share = share
    rates = []
    try:
        for number in range(8):
            trainer.current_epoch = number // 4
            trainer.train_step(tiny.batch(number))
            rates.append(trainer.optimizer.param_groups[0]["lr"] / trainer.initial_lr)
    finally:
        type(trainer).restarts_schedule = restarts
    length = 4 if share else 8
    assert rates == pytest.approx([(1 - number / length) ** 0.9 for number in range(length)] * (8 // length))


def test_momentum_of_sgd(tiny):
    trainer = tiny.trainer("Supervised", momentum=0.9, nesterov=False)
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, False)
    (group,) = tiny.trainer("Supervised", recipe="nnunet").optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.99, True)


def optimizers(trainer):
    return [trainer.optimizer, *trainer._optimizers.values()]


def test_learning_rates_rise_wherever_the_schedule_starts(tiny):
    trainer = tiny.trainer("TwoNetworks", pretrain_share=0.5, warmup_steps=2, num_iterations_per_epoch=4)
    rates = []
    for seed in range(8):
        trainer.current_epoch = trainer.iteration // 4
        trainer.train_step(tiny.batch(seed))
        rates.append(trainer.optimizer.param_groups[0]["lr"] / trainer.initial_lr)
    assert rates == pytest.approx([0.5, 1, 1, 1] * 2)
