from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint

import pytest

from nnssl.errors import UserError
from nnssl.trainers import registry


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry.registered_trainers()))
    return registry


def test_finds_trainers_by_name():
    assert registry.get_trainer("MeanTeacher").__name__ == "MeanTeacher"
    assert "Supervised" in registry.trainer_names()


def test_registering_twice_is_an_error(own_registry):
    with pytest.raises(ValueError, match="two trainers are called Supervised"):
        own_registry.register(type("Supervised", (), {"__module__": "elsewhere"}))


def test_registering_the_same_class_again_is_not(own_registry):
    trainer = own_registry.get_trainer("Supervised")
    assert own_registry.register(trainer) is trainer


def test_unknown_name_gets_suggestions():
    with pytest.raises(UserError, match="MeanTeecher") as error:
        registry.get_trainer("MeanTeecher")
    assert "MeanTeacher" in error.value.fix


def test_nnunets_own_trainer_is_found_without_its_search(monkeypatch):
    def search(name):
        raise AssertionError("the search imports everything")

    monkeypatch.setattr("nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", search)
    assert registry.get_trainer("nnUNetTrainer").__name__ == "nnUNetTrainer"


def test_a_failing_search_of_nnunet_is_told(monkeypatch):
    def search(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", search)
    with pytest.raises(UserError, match="nnUNetTrainerX failed") as error:
        registry.get_trainer("nnUNetTrainerX")
    assert "torchvision" in error.value.found


def test_other_packages_add_trainers(own_registry, monkeypatch):
    class Foreign:
        pass

    class FakeEntryPoint:
        def load(self):
            return Foreign

    monkeypatch.setattr(own_registry, "_loaded", False)
    monkeypatch.setattr(own_registry, "entry_points", lambda group: [FakeEntryPoint()])
    assert own_registry.get_trainer("Foreign") is Foreign


def test_import_errors_of_other_packages_are_not_hidden(own_registry, monkeypatch):
    broken = EntryPoint("broken", "no_such_module_at_all", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(own_registry, "_loaded", False)
    monkeypatch.setattr(own_registry, "entry_points", lambda group: [broken])
    with pytest.raises(ModuleNotFoundError):
        own_registry.registered_trainers()
    assert importlib.metadata.entry_points(group="no.such.group") == ()
