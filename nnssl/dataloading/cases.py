"""Preprocessed cases of the two streams, opened memory-mapped when a patch is cut from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import blosc2

from nnssl.errors import UserError

UNLABELED_SUFFIX = "_unlabeled"
MASK_SUFFIX = "_mask"


def unlabeled_folder(labeled_folder: str | os.PathLike[str]) -> Path:
    """Folder of the preprocessed unlabeled cases that belongs to a ``<data_identifier>`` folder."""
    path = Path(labeled_folder)
    return path.with_name(path.name + UNLABELED_SUFFIX)


def unlabeled_identifiers(folder: str | os.PathLike[str]) -> list[str]:
    """Sorted case names in a ``<data_identifier>_unlabeled`` folder; empty if there is none.

    The mask of a case is not a case, nor is a segmentation that someone has put beside it.
    """
    path = Path(folder)
    names = {f.name.removesuffix(".b2nd") for f in path.glob("*.b2nd")} if path.is_dir() else set()
    companions = {name + suffix for name in names for suffix in (MASK_SUFFIX, "_seg")}
    return sorted(name for name in names - companions if not name.startswith("."))


class UnlabeledCases:
    """Images without labels.

    Args:
        folder: ``<data_identifier>_unlabeled``.
        identifiers: case names.
        with_mask: whether the nonzero mask is opened too (needed where normalization leaves the outside at zero).
    """

    def __init__(self, folder: str | os.PathLike[str], identifiers: list[str], *, with_mask: bool = False):
        blosc2.set_nthreads(1)
        self.folder = Path(folder)
        self.identifiers = list(identifiers)
        self.with_mask = with_mask

    def load_case(self, identifier: str) -> tuple[Any, Any | None]:
        """Memory-mapped image ``(C, *S)`` and nonzero mask ``(1, *S)``, 1 inside, or None."""
        image = self._open(identifier)
        return image, self._open(identifier + MASK_SUFFIX) if self.with_mask else None

    def _open(self, name: str) -> Any:
        return open_memory_mapped(self.folder / f"{name}.b2nd")


def open_memory_mapped(path: Path) -> Any:
    """Opens a compressed array, of which only what is looked at is read."""
    # memory mapping fails on Windows, see nnU-Net issue 2723
    mapping = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapping)


def has_first_stage_mask(folder: str | os.PathLike[str], case: str) -> bool:
    """Whether the first stage of a cascade has predicted a case into its ``predicted_next_stage/<stage>`` folder."""
    return any(Path(folder, case + ending).is_file() for ending in (".b2nd", ".npy", ".npz"))


def how_to_make_first_stage_masks(folder: str | os.PathLike[str]) -> str:
    """What to run so that such a folder is filled, by the names that nnU-Net gave the folders above it."""
    run = Path(folder).parents[1]
    trainer, _, rest = run.name.partition("__")
    plans, _, configuration = rest.rpartition("__")
    return (
        f"nnssl_train {run.parent.name} {trainer} FOLD -c {configuration} -p {plans} for every fold by its number, "
        "with --val where that is trained already: each predicts the cases that it validates on"
    )


class UnreadableCase(UserError, RuntimeError):
    """A preprocessed case cannot be read. One line, so that it can be told from the traceback of a worker process."""


class NamedErrors:
    """A data set of cases whose reading errors name the case.

    Wraps nnU-Net's data sets and `UnlabeledCases`; everything but ``load_case`` is passed on.
    """

    def __init__(self, cases: Any):
        self._cases = cases

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_cases":
            raise AttributeError(name)
        return getattr(self._cases, name)

    def load_case(self, identifier: str) -> Any:
        try:
            return self._cases.load_case(identifier)
        except Exception as error:
            first_stage = getattr(self._cases, "folder_with_segs_from_previous_stage", None)
            if first_stage is not None and not has_first_stage_mask(first_stage, identifier):
                raise UnreadableCase(
                    f"the first stage of the cascade has not predicted case {identifier} (nothing in {first_stage}); "
                    f"run {how_to_make_first_stage_masks(first_stage)}"
                ) from error
            raise UnreadableCase(
                f"preprocessed case {identifier} cannot be read ({type(error).__name__}: {error}); "
                "run nnssl_plan_and_preprocess again: it makes only what is missing or changed"
            ) from error
