"""The folder of the masks: how they were made, what may be overwritten, and what goes with a mask that is replaced."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.inference.cases import InputCase
from nnssl.inference.contents import files_content
from nnssl.inference.quality import discard_estimates
from nnssl.utils.files import read_json, write_json

RECORD = "predict_from_raw_data_args.json"
_CASES = "cases"
_SUMMARY = "summary.json"
_TABLE = "summary.csv"
_TABLE_BEGINS = "case,class,label,status"
_SHOWN = 5


def read_record(output: Path) -> dict[str, Any]:
    """How the masks in the folder were made; empty if no prediction wrote to it.

    Raises:
        UserError: if the record is damaged.
    """
    if not (output / RECORD).is_file():
        return {}
    record = read_json(
        output / RECORD, fix="choose another folder with -o, or remove this file and the masks beside it"
    )
    return record if isinstance(record, dict) else {}


def check_output(
    output: Path, cases: Sequence[InputCase], ending: str, record: dict[str, Any], continues: bool, same: Sequence[str]
) -> None:
    """Refuses an output folder in which the prediction would overwrite scans or reference labels, or mix two models.

    Args:
        output: the folder.
        cases: to be segmented.
        ending: of the masks.
        record: how they will be made, as it is written to the folder.
        continues: whether masks that are there are kept.
        same: entries of the record that may not differ from those of masks that stay. The first tells who makes the
            masks; of the others those are compared that were recorded.

    Raises:
        UserError: as described.
    """
    if (output.exists() and not output.is_dir()) or output.name.endswith(ending):
        raise UserError("-o is not a folder", found=output, fix="name a folder; each mask gets the name of its case")
    folders = {file.parent.resolve() for case in cases for file in case.files}
    if output.resolve() in folders:
        raise UserError("the output folder is the input folder", found=output, fix="choose another folder with -o")
    if not continues:
        refuse_unrecorded(output, [case.name for case in cases], ending)
    before = read_record(output)
    differing = [key for key in same if (key in before or key == same[0]) and before.get(key) != record[key]]
    if not before or not differing:
        return
    own = {f"{case.name}{ending}" for case in cases}
    masks = _masks(output, ending)
    others = [name for name in masks if name not in own]
    if others or (continues and masks):
        raise _two_ways(output, before, record, differing, others, continues)


def refuse_unrecorded(output: Path, names: Iterable[str], ending: str) -> None:
    """``UserError`` if masks of the named cases are to be replaced in a folder to which no prediction wrote."""
    present = [f"{name}{ending}" for name in names if (output / f"{name}{ending}").exists()]
    if present and not (output / RECORD).is_file():
        raise UserError(
            "the output folder holds files with the names of the masks that no prediction wrote",
            where=output,
            found=_first(present),
            fix="choose another folder with -o; if the files may go, remove them",
        )


def case_contents(cases: Sequence[InputCase], previous_stage: Path | None, ending: str) -> dict[str, str]:
    """By the name of a case what tells its scan, and its mask of the previous stage, from others."""
    contents = {}
    for case in cases:
        mask = [] if previous_stage is None else [Path(previous_stage) / f"{case.name}{ending}"]
        contents[case.name] = files_content([*case.files, *filter(Path.is_file, mask)])
    return contents


def made_of_the_same(output: Path, done: Iterable[str], contents: Mapping[str, str], what: str = "scan") -> list[str]:
    """Those of the finished cases whose masks were made from the files that are there now; tells of the others.

    Masks whose files the record does not tell, since an earlier version wrote it, are taken for such.
    """
    before, same = read_record(output).get(_CASES) or {}, []
    for name in done:
        if before.get(name, contents[name]) == contents[name]:
            same.append(name)
        else:
            print(f"{name}: is predicted again, since its mask was made from another {what}", flush=True)
    return same


def write_record(output: Path, record: dict[str, Any], contents: Mapping[str, str], ending: str) -> None:
    """Writes how the masks are made; cases whose masks are there keep what they were made from.

    Several runs may share the cases (``-num_parts``), so that each writes for all that are not done.
    """
    before = read_record(output).get(_CASES) or {}
    done = {name.removesuffix(ending) for name in _masks(output, ending)}
    cases = {name: content for name, content in before.items() if name in done}
    cases |= {name: content for name, content in contents.items() if name not in done}
    write_json({**record, _CASES: dict(sorted(cases.items()))}, output / RECORD)


def remove_masks(output: Path, names: Sequence[str], ending: str) -> None:
    """Removes what a prediction, or an evaluation in its folder, wrote for cases that are predicted anew.

    These are masks, probabilities, maps and estimates of the uncertainty, and the summary of an evaluation in which
    one of the cases has a part. What goes beside the masks is told. Nothing is touched where no prediction wrote.
    """
    if not (output / RECORD).is_file():
        return
    derived = [
        *_summary_files(output, names, ending),
        *(file for name in names for file in _probabilities(output, name)),
    ]
    for file in derived:
        file.unlink(missing_ok=True)
    derived += discard_estimates(output, names)
    for name in names:
        (output / f"{name}{ending}").unlink(missing_ok=True)
    if derived:
        print(f"Removed with the earlier masks: {_first([str(file.relative_to(output)) for file in derived])}")


def _masks(output: Path, ending: str) -> list[str]:
    if not output.is_dir():
        return []
    return sorted(file.name for file in output.iterdir() if file.name.endswith(ending) and file.name[0] != ".")


def _two_ways(
    output: Path,
    before: Mapping[str, Any],
    record: Mapping[str, Any],
    differing: Sequence[str],
    others: Sequence[str],
    continues: bool,
) -> UserError:
    made = "; ".join(f"{key} {before.get(key, 'not recorded')}" for key in differing)
    wanted = "; ".join(f"{key} {record[key]}" for key in differing)
    if continues:
        return UserError(
            "the masks in the output folder were made in another way, so the prediction cannot be continued",
            where=output,
            expected=made,
            found=wanted,
            fix="choose another folder with -o"
            + ("" if others else ", or leave out --continue_prediction to predict all cases again"),
        )
    return UserError(
        f"the output folder holds {len(others)} mask{'s' * (len(others) > 1)} of other cases, made in another way",
        where=output,
        expected=made,
        found=f"{wanted}; other cases: {_first(others)}",
        fix="choose another folder with -o, or predict as those were, with --continue_prediction; if they may go, "
        "remove them",
    )


def _probabilities(output: Path, name: str) -> list[Path]:
    """What nnU-Net writes with ``--save_probabilities``; files of others with these names are left alone."""
    file = output / f"{name}.npz"
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        if archive.namelist() == ["probabilities.npy"]:
            return [path for path in (file, file.with_name(f"{name}.pkl")) if path.is_file()]
    return []


def _summary_files(output: Path, names: Sequence[str], ending: str) -> list[Path]:
    """Summary and table of an evaluation in which one of the cases has a part."""
    try:
        entries = read_json(output / _SUMMARY)["metric_per_case"]
        scored = {os.path.basename(entry["prediction_file"]).removesuffix(ending) for entry in entries}
    except (UserError, KeyError, TypeError):  # there is none, or it is no summary of nnssl or nnU-Net
        return []
    if scored.isdisjoint(names):
        return []
    table = output / _TABLE
    with suppress(OSError, UnicodeDecodeError), open(table, encoding="utf-8") as stream:
        if stream.readline().startswith(_TABLE_BEGINS):
            return [output / _SUMMARY, table]
    return [output / _SUMMARY]


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
