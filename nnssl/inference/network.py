"""The network of a trained model, built as the trainer builds it for prediction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.ensemble import Ensemble, member_numbers
from nnssl.planners.plans_file import data_differences


def managers(plans: dict, configuration: str, where: object) -> tuple[PlansManager, ConfigurationManager]:
    """nnU-Net's views of the plans; ``UserError`` if they lack the configuration that the checkpoint names."""
    plans_manager = PlansManager(plans)
    if configuration not in plans_manager.available_configurations:
        raise UserError(
            "plans.json does not belong to the checkpoint",
            where=where,
            expected=f"configuration {configuration}",
            found=", ".join(plans_manager.available_configurations),
        )
    return plans_manager, plans_manager.get_configuration(configuration)


def require_own_plan(checkpoint: Mapping[str, Any], plans: dict, where: object) -> None:
    """``UserError`` if the network was trained on images that another plan prepares in another way.

    The folds of a model share its plans.json, which the training that began last has written. Exported checkpoints
    hold no plan of their own.
    """
    trained = checkpoint["init_args"].get("plans")
    differing = trained and data_differences(trained, plans, checkpoint["init_args"]["configuration"])
    if differing:
        raise UserError(
            "the fold was trained with another plan than that of its model, which a later training has replaced",
            where=where,
            found=f"another {', another '.join(differing)}",
            fix="predict with the folds of the present plan (-f), train this one again (--overwrite), or put back the "
            "plans.json that it was trained with: it is the entry plan of its run.json",
        )


def build_network(
    trainer: Any,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    weights: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The trainer's network without deep supervision, with fresh weights.

    If ``weights`` are those of an `Ensemble`, it is one of the same members. Member ``i`` is built by the trainer's
    ``build_member_architecture(i, ...)``, or, if it has none, like its network.
    """
    inputs = determine_num_input_channels(plans_manager, configuration_manager, dataset_json)
    labels = plans_manager.get_label_manager(dataset_json)
    arguments = (plans_manager, configuration_manager, inputs, labels.num_segmentation_heads)
    members = member_numbers(weights or ())
    if not members:
        return _build(trainer, *arguments)
    build_member = getattr(trainer, "build_member_architecture", None)
    networks = {
        i: _build(trainer, *arguments) if build_member is None else build_member(i, *arguments, False) for i in members
    }
    return Ensemble(networks, labels.has_regions)


def _build(
    trainer: Any, plans_manager: PlansManager, configuration_manager: ConfigurationManager, inputs: int, outputs: int
) -> nn.Module:
    """Serves both forms of ``build_network_architecture``: nnU-Net's present one and the one before 2.7, which trainers
    of other packages may still have."""
    build = trainer.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision=False)
    return build(
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        inputs,
        outputs,
        enable_deep_supervision=False,
    )


def load_weights(network: nn.Module, weights: dict, trainer: str, where: object) -> None:
    """Loads ``weights``; ``UserError`` with the first differences if they belong to another network."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit the network of {trainer}",
            where=where,
            found=" ".join("\n".join(str(error).splitlines()[1:3]).split())[:400],
            fix="the checkpoint, plans.json and dataset.json must come from one training; copy the folder as a whole",
        ) from None
