"""Modules that get further abilities from outside, without another name, weight or wrapper."""

from __future__ import annotations

from torch import nn


def mix_in(mixin: type[nn.Module], module: nn.Module) -> None:
    """Puts ``mixin`` before the class of ``module``, if it is not among its bases already.

    Weights, their names and results stay what they were. The class is exchanged, and no forward hook registered,
    because ``torch.compile`` does not look at hooks when it decides whether code it has compiled for one network
    serves another of the same kind: hooks would then be skipped without a word.

    Args:
        mixin: a module class whose ``forward`` calls the next one by ``super()``; it has no ``__init__``.
        module: changed in place. Copies that are made of it later have the mixin, too.
    """
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module))


_mixtures: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _mixed(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    # one class for all modules of a kind, so that code compiled for one of them serves its copies
    if (mixin, kind) not in _mixtures:
        _mixtures[mixin, kind] = type(f"{mixin.__name__.strip('_')}{kind.__name__}", (mixin, kind), {})
    return _mixtures[mixin, kind]
