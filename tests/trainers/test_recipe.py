import pytest
import torch

from nnssl.trainers.engine.recipe import SHORT_BELOW, describe_recipe
from tests.support.tiny import Tiny

LONG = {"num_epochs": SHORT_BELOW // 10, "num_iterations_per_epoch": 10}
NNUNET = {"optimizer_name": "SGD", "initial_lr": 1e-2, "weight_decay": 3e-5}
SHORT = {"optimizer_name": "AdamW", "initial_lr": 2e-3, "weight_decay": 0.01}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return Tiny().write(tmp_path, monkeypatch)


def values(trainer):
    return {name: getattr(trainer, name) for name in NNUNET}


@pytest.mark.parametrize(
    ("overrides", "recipe", "expected"),
    [
        ({}, "short", SHORT),
        (LONG, "nnunet", NNUNET),
        (LONG | {"num_epochs": SHORT_BELOW // 10 - 1}, "short", SHORT),
        (LONG | {"recipe": "short"}, "short", SHORT),
        ({"recipe": "nnunet"}, "nnunet", NNUNET),
        ({"initial_lr": 5e-3}, "short", SHORT | {"initial_lr": 5e-3}),
        ({"optimizer_name": "SGD"}, "nnunet", NNUNET),
        ({"optimizer_name": "AdamW"}, "short", SHORT),
        ({"momentum": 0.9}, "nnunet", NNUNET),
        ({"nesterov": False}, "nnunet", NNUNET),
    ],
)
def test_recipe_follows_the_number_of_steps_and_what_the_user_chose(tiny, overrides, recipe, expected):
    trainer = tiny.bare_trainer("Supervised")
    trainer.configure({"num_epochs": 2, "num_iterations_per_epoch": 2} | overrides)
    assert (trainer.recipe, values(trainer)) == (recipe, expected)
    assert trainer.hyperparameter_values().items() >= {"recipe": recipe, **expected}.items()


def test_the_optimizer_is_that_of_the_recipe(tiny):
    adamw = tiny.trainer("Supervised").optimizer
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (2e-3, 0.01)
    sgd = tiny.trainer("Supervised", recipe="nnunet").optimizer
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.param_groups[0]["lr"]) == (0.99, 1e-2)


def test_a_value_of_the_method_stays(tiny):
    trainer = tiny.bare_trainer("ReciprocalLearning")
    trainer.configure({"num_epochs": 1})
    assert values(trainer) == {"optimizer_name": "AdamW", "initial_lr": 2e-3, "weight_decay": 1e-4}


def test_a_continued_training_keeps_its_recipe(tiny, tmp_path):
    trainer = tiny.trainer("Supervised", initial_lr=5e-3)
    trainer.save_checkpoint(str(tmp_path / "stopped.pth"))
    continued = tiny.bare_trainer("Supervised")
    continued.load_checkpoint(str(tmp_path / "stopped.pth"))
    assert continued.hyperparameter_values() == trainer.hyperparameter_values()


def test_the_log_says_which_recipe_is_used(tiny):
    line = describe_recipe(tiny.trainer("Supervised"))
    assert line.startswith("recipe for 4 steps: short (AdamW, learning rate 0.002, weight decay 0.01)")
