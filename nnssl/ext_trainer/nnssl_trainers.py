"""Every trainer of nnssl's registry as an attribute of this module, where stock nnU-Net's search asks for it.

The search imports each module of the folder and asks ``hasattr(module, name)``. Only registered names are answered:
`nnssl.trainers.registry.get_trainer` asks nnU-Net's search for others, which would come back to this module.
"""

from __future__ import annotations

from nnssl.trainers.registry import registered_trainers


def __getattr__(name: str) -> type:
    if not name.startswith("_") and name in registered_trainers():
        return registered_trainers()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *registered_trainers()]
