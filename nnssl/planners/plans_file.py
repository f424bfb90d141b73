"""Reading plans: what nnU-Net needs is there, and nothing in them makes it load code from anywhere."""

from __future__ import annotations

import json
import os
import pydoc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.utils.files import read_json

TRUSTED_VARIABLE = "NNSSL_TRUSTED_PACKAGES"
_TRUSTED = ("torch.nn", "dynamic_network_architectures", "nnunetv2", "nnssl")
_ENTRIES = ("dataset_name", "plans_name", "image_reader_writer", "transpose_forward", "transpose_backward")
_CONFIGURATION_ENTRIES = (
    "data_identifier",
    "preprocessor_name",
    "batch_size",
    "patch_size",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
)
_DATA_ENTRIES = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)
# they go by the image itself; all others may use the intensities of the training cases
_OWN_INTENSITIES = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
# the second one is that of plans before nnU-Net 2.2, which it still reads
_ARCHITECTURES = ("architecture", "UNet_class_name")


def read_plans(path: str | os.PathLike[str], *, fix: str | None = None) -> dict[str, Any]:
    """Content of a plans file.

    Raises:
        UserError: with ``fix``, if the file is missing, no JSON, or lacks what nnU-Net needs.
    """
    plans = read_json(path, fix=fix)
    if not isinstance(plans, dict):
        raise UserError("the plans are not an object", where=path, found=type(plans).__name__, fix=fix)
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not all(isinstance(one, dict) for one in configurations.values()):
        raise UserError("the plans lack their configurations", where=path, fix=fix)
    missing = [name for name in _ENTRIES if name not in plans]
    if missing:
        raise UserError(f"the plans lack {', '.join(missing)}", where=path, fix=fix)
    for name in configurations:
        resolved = _resolved(configurations, name)
        missing = [entry for entry in _CONFIGURATION_ENTRIES if resolved.get(entry) is None]
        if not any(resolved.get(entry) for entry in _ARCHITECTURES):
            missing.append(_ARCHITECTURES[0])
        if missing:
            raise UserError(f"configuration {name} of the plans lacks {', '.join(missing)}", where=path, fix=fix)
    return plans


def refuse_foreign_code(plans: dict[str, Any], configuration: str, where: str | os.PathLike[str]) -> None:
    """``UserError`` if the plans name a network, or layers of it, that are not classes of a trusted package.

    nnU-Net imports whatever module such a name begins with, and calls what the name stands for. Trusted are nnU-Net's
    packages, ``torch.nn``, nnssl, and those that the environment variable ``NNSSL_TRUSTED_PACKAGES`` lists.
    """
    from torch import nn  # here, since reading plans needs none of it

    trusted = _TRUSTED + tuple(filter(None, os.environ.get(TRUSTED_VARIABLE, "").replace(",", " ").split()))
    for name in _classes(_resolved(plans["configurations"], configuration)):
        if not _within(name, trusted):
            raise UserError(
                "the plans name a network of a package that is not trusted, whose code would be run",
                where=Path(where),
                expected=f"a class of {', '.join(trusted)}",
                found=name,
                fix=f"if you know the package, trust it: export {TRUSTED_VARIABLE}={name.split('.')[0]}",
            )
        found = pydoc.locate(name) or _moved(name)
        if not (isinstance(found, type) and issubclass(found, nn.Module) and _within(found.__module__, trusted)):
            raise UserError("the plans name a network, or a layer, that does not exist", where=Path(where), found=name)


def data_differences(plans: dict[str, Any], other: dict[str, Any], configuration: str) -> list[str]:
    """Entries by which networks of both plans see the same image in different ways, both with this configuration."""
    facts, other_facts = _data_facts(plans, configuration), _data_facts(other, configuration)
    return [name for name, value in facts.items() if value != other_facts[name]]


def _data_facts(plans: dict[str, Any], configuration: str) -> dict[str, str]:
    planned = _resolved(plans["configurations"], configuration)
    properties = plans.get("foreground_intensity_properties_per_channel") or {}
    intensities = {
        channel: properties.get(str(channel))
        for channel, scheme in enumerate(planned.get("normalization_schemes") or ())
        if scheme not in _OWN_INTENSITIES
    }
    facts = {name: planned.get(name) for name in _DATA_ENTRIES}
    facts |= {"transpose_forward": plans.get("transpose_forward"), "intensities of the training cases": intensities}
    # tuples and lists are the same
    return {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}


def _resolved(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """Entries of a configuration together with those that it inherits."""
    chain: list[str] = []
    while name in configurations and name not in chain:
        chain.append(name)
        name = configurations[name].get("inherits_from", "")
    merged: dict[str, Any] = {}
    for one in reversed(chain):
        merged |= configurations[one]
    return merged


def _classes(configuration: dict[str, Any]) -> Iterator[str]:
    architecture = configuration.get("architecture")
    if isinstance(architecture, dict):
        yield str(architecture.get("network_class_name"))
        arguments = architecture.get("arch_kwargs") or {}
        for key in architecture.get("_kw_requires_import") or ():
            if arguments.get(key) is not None:
                yield str(arguments[key])


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _moved(name: str) -> Any:
    """nnU-Net's own search for architectures that are in another module than they were."""
    import dynamic_network_architectures
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(dynamic_network_architectures.__path__[0]) / "architectures"
    module = "dynamic_network_architectures.architectures"
    return recursive_find_python_class(str(folder), name.split(".")[-1], module)
