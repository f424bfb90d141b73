"""``run.json``: what is needed to repeat a run."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import nnssl
from nnssl.preprocessing.configuration import open_manifests
from nnssl.utils.files import read_json

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

RECORD = "run.json"
_PACKAGES = ("nnunetv2", "torch", "numpy", "scipy", "batchgenerators", "batchgeneratorsv2", "acvl-utils", "blosc2",
             "SimpleITK", "dynamic-network-architectures")  # fmt: skip


def run_record(trainer: SemiSupervisedTrainer) -> dict[str, Any]:
    """What belongs into ``run.json`` of a training that is about to take its first step.

    A training that goes on keeps the command that it began with; those that continued it are listed under
    ``continued`` with the step they began at.
    """
    path = Path(trainer.output_folder, RECORD)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begun: dict[str, Any] = {"command": sys.argv, "started": now, "continued": []}
    weights = trainer.settings.pretrained_weights
    if weights is not None and trainer.iteration == 0:
        begun["pretrained_weights_sha256"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    if trainer.iteration > 0 and path.is_file():
        before = read_json(path)
        begun = {key: before[key] for key in (*begun, "pretrained_weights_sha256") if key in before}
        begun["continued"] = [
            *begun.get("continued", []),
            {"command": sys.argv, "started": now, "step": trainer.iteration},
        ]
    split = trainer.split()
    return {
        **begun,
        "trainer": type(trainer).__name__,
        "hyperparameters": trainer.hyperparameter_values(),
        "settings": trainer.settings.as_dict(),
        "dataset": trainer.plans_manager.dataset_name,
        "plans": trainer.plans_manager.plans_name,
        "configuration": trainer.configuration_name,
        "fold": trainer.fold,
        "cases": {"labeled": len(split.train), "unlabeled": len(split.unlabeled)},
        "case_keys": case_keys(trainer),
        "device": str(trainer.device),
        "processes": trainer.ranks.size,
        "versions": {
            "nnssl": nnssl.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "git": git_state(Path(nnssl.__file__).parent),
        "machine": hardware(trainer.device),
        "plan": trainer.plans_manager.plans,
    }


def case_keys(trainer: SemiSupervisedTrainer) -> dict[str, dict[str, Any]]:
    """Cases of each part of the fold with the hashes of the raw files they were preprocessed from.

    A case that stock nnU-Net preprocessed has None.
    """
    manifests = open_manifests(
        trainer.plans_manager.plans,
        trainer.configuration_name,
        trainer.dataset_json,
        Path(trainer.preprocessed_dataset_folder_base),
    )
    split = trainer.split()
    parts = (("train", "labeled", split.train), ("validation", "labeled", split.val),
             ("unlabeled", "unlabeled", split.unlabeled))  # fmt: skip
    return {
        part: {case: manifests[kind].cases.get(case, {}).get("content") for case in cases}  # type: ignore[index]
        for part, kind, cases in parts
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that ``folder`` belongs to, and whether its tracked files differ; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # an installed package may lie below a checkout of something else
        if not git("ls-files", "--error-unmatch", "__init__.py"):
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine: system, processor, cores, memory in GB, and the CUDA device with its driver's CUDA version."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
