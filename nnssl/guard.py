"""Refuses to run beside the DKFZ self-supervised pre-training framework, which has the same package name."""

from __future__ import annotations

import importlib.metadata
import importlib.util

_OURS = "Semi-supervised and few-shot medical image segmentation on top of nnU-Net v2"


def refuse_other_nnssl() -> None:
    """Raises ImportError if another distribution called nnssl shares this environment.

    The DKFZ framework ships ``nnssl.architectures``, which this package never will; pip overwrites one with the
    other without a word, and the mixture fails in ways that nobody can read.
    """
    other = importlib.util.find_spec("nnssl.architectures") is not None
    if not other:
        summaries = (d.metadata.get("Summary") for d in importlib.metadata.distributions(name="nnssl"))
        other = any(summary != _OURS for summary in summaries)
    if other:
        raise ImportError(
            "Another package called nnssl (the DKFZ framework for self-supervised pre-training) is installed in this "
            "environment and both overwrite each other: either use a fresh virtual environment for this package, or "
            "run 'pip uninstall -y nnssl' until nothing is left and install this package again."
        )
