"""Trainers that are tried out and leave nothing behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_traces(**environment: str) -> Iterator[None]:
    """While inside, runs are written to a folder that is deleted afterwards.

    Trainers take the folder of results from the environment. ``environment``: further variables to be set meanwhile.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = {"nnUNet_results": folder, **environment}
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
