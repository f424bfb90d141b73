"""Look-up of trainers by class name."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from importlib.metadata import entry_points
from typing import TypeVar

from nnssl.errors import UserError

ENTRY_POINT_GROUP = "nnssl.trainers"

_registered: dict[str, type] = {}
_loaded = False

T = TypeVar("T", bound=type)


def register(trainer: T) -> T:
    """Class decorator: makes a trainer known under its class name.

    Raises:
        ValueError: if another class of the same name is registered.
    """
    other = _registered.get(trainer.__name__)
    if other is not None and (other.__module__, other.__qualname__) != (trainer.__module__, trainer.__qualname__):
        raise ValueError(
            f"two trainers are called {trainer.__name__}: {other.__module__} and {trainer.__module__}; rename one"
        )
    _registered[trainer.__name__] = trainer
    return trainer


def registered_trainers() -> dict[str, type]:
    """All trainers by name: nnssl's own, then those of other packages (entry points ``nnssl.trainers``).

    An entry point names a module whose import registers trainers, or a trainer class. Import errors are not hidden.
    """
    global _loaded
    if not _loaded:
        package = importlib.import_module("nnssl.trainers")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.ispkg:
                importlib.import_module(f"{package.__name__}.{module.name}")
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            loaded = entry.load()
            if isinstance(loaded, type):
                register(loaded)
        _loaded = True
    return dict(sorted(_registered.items()))


def trainer_names() -> list[str]:
    """Names of all registered trainers, sorted."""
    return list(registered_trainers())


def get_trainer(name: str) -> type:
    """The trainer class called ``name``: a registered one, else one that nnU-Net's own search finds.

    nnU-Net's search imports all its trainers, so it is only asked for names that can be its own: those that begin
    with ``nnUNet``, or any name if ``nnUNet_extTrainer`` is set.

    Raises:
        UserError: if there is no such trainer (with the nearest names), or nnU-Net's search itself fails.
    """
    known = registered_trainers()
    if name in known:
        return known[name]
    if name == "nnUNetTrainer":
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        return nnUNetTrainer
    if name.startswith("nnUNet") or os.environ.get("nnUNet_extTrainer"):
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        try:
            return recursive_find_trainer_class_by_name(name)
        except Exception as error:
            raise UserError(f"nnU-Net's search for trainer {name} failed", found=str(error)) from error
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise UserError(
        f"no trainer is called {name!r}",
        expected=", ".join(known),
        fix=f"did you mean {' or '.join(near)}?" if near else "nnssl_trainers lists them",
    )
