"""The integrity check of a raw data set: every problem of all labeled, unlabeled and test cases in one report."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from nnssl.dataset.case_check import FOLDERS, CaseFacts, CheckRules, Finding, Kind, Severity, check_case, short_path
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError

SHOWN_FINDINGS = 20
_IMAGE_ENDINGS = (
    ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg",
    ".gif", ".dcm", ".img", ".hdr", ".npy", ".npz",
)  # fmt: skip


def check_dataset(raw: RawDataset, num_processes: int = 8, allow_suspicious: bool = False) -> list[str]:
    """Checks a raw data set and returns the warnings, a sentence each; one ``UserError`` tells all that is wrong.

    Errors of labeled and unlabeled cases:

    - a case both in ``imagesTr`` and ``imagesUn``, an image without label, a label without image, no labeled case;
    - misnamed files, other image formats than ``file_ending``, broken links, missing channels;
    - missing, empty, truncated or unreadable files, files with more than three dimensions or without valid spacing;
    - shape, spacing, origin or direction that differ among the channels or between image and label;
    - 2D and 3D cases in one data set; NaN or infinite values; label values that ``dataset.json`` does not declare;
    - all labels empty; the same image as labeled and as test case, which would make the test worthless.

    Suspicious, which ``allow_suspicious`` makes warnings of: constant images; empty labels (cases without a lesion are
    meant to have one); NaN in NIfTI files, which SimpleITK reads as 0; the same image under two names (it counts twice;
    unlabeled and test: training sees the test image).

    Warnings: all defects of test cases alone (training never reads them); classes in no label; case names shared with
    test cases; sheared axes; ``numTraining`` that is not the number of labeled cases; stray files.

    Every file is read once, in ``num_processes`` processes.
    """
    findings = _check_files(raw) + _check_case_lists(raw)
    rules = CheckRules(raw.reader_writer_class(), raw.num_channels, tuple(raw.label_values), raw.ignore_label)
    jobs: dict[str, tuple[Kind, str, list[str], str | None, CheckRules]] = {}
    for case, files in raw.labeled.items():
        jobs[f"imagesTr/{case}"] = ("labeled", case, files.images, files.label, rules)
    for case, images in raw.unlabeled.items():
        jobs[f"imagesUn/{case}"] = ("unlabeled", case, images, None, rules)
    for case, images in raw.test.items():
        jobs[f"imagesTs/{case}"] = ("test", case, images, None, rules)
    results = map_cases(check_case, jobs, num_processes=num_processes, description="Integrity check")
    facts = list(results.values())
    findings += [finding for case in facts for finding in case.findings]
    findings += _check_dimensions(facts) + _check_duplicates(facts) + _check_classes(raw, facts)
    by_severity: dict[Severity, list[str]] = {"error": [], "suspicious": [], "warning": []}
    for finding in findings:
        by_severity[finding.severity].append(str(finding))
    if by_severity["error"] or (by_severity["suspicious"] and not allow_suspicious):
        allow = "" if by_severity["error"] else ", or allow what is meant to be so with --allow_suspicious"
        raise UserError(
            _report(raw.name, by_severity), where=raw.folder, fix=f"mend the files named above and check again{allow}"
        )
    return by_severity["suspicious"] + by_severity["warning"]


def _report(name: str, by_severity: dict[Severity, list[str]]) -> str:
    units = {"error": "error(s)", "suspicious": "suspicious finding(s)", "warning": "warning(s)"}
    counts = " and ".join(f"{len(found)} {units[severity]}" for severity, found in by_severity.items() if found)
    lines = [f"{severity}: {finding}" for severity, found in by_severity.items() for finding in found]
    if len(lines) > SHOWN_FINDINGS:
        lines[SHOWN_FINDINGS:] = [f"and {len(lines) - SHOWN_FINDINGS} more"]
    return "\n    ".join([f"the integrity check of {name} found {counts}", *lines])


def _check_files(raw: RawDataset) -> list[Finding]:
    """Names in the image folders and in ``labelsTr``, without opening a file."""
    findings: list[Finding] = []
    image_rule = re.compile(rf".+_\d{{4}}{re.escape(raw.file_ending)}", re.DOTALL)
    folders = [FOLDERS["unlabeled"], FOLDERS["test"]]
    if not raw.has_explicit_files:
        folders.insert(0, FOLDERS["labeled"])
        findings += _check_folder(raw.folder / "labelsTr", raw.file_ending, None)
        findings += _labels_without_image(raw)
        findings += _check_channel_numbers("labeled", {case: files.images for case, files in raw.labeled.items()})
    for folder in folders:
        findings += _check_folder(raw.folder / folder, raw.file_ending, image_rule)
    findings += _check_channel_numbers("unlabeled", raw.unlabeled) + _check_channel_numbers("test", raw.test)
    return findings


def _check_channel_numbers(kind: Kind, cases: dict[str, list[str]]) -> list[Finding]:
    findings = []
    for case, images in cases.items():
        numbers = [int(Path(image).name[len(case) + 1 : len(case) + 5]) for image in images]
        if numbers != list(range(len(numbers))):
            message = f"channels are {', '.join(f'{n:04d}' for n in numbers)}, they must count up from 0000 without gap"
            findings.append(Finding("warning" if kind == "test" else "error", f"{FOLDERS[kind]}/{case}", message))
    return findings


def _check_folder(folder: Path, ending: str, name_rule: re.Pattern[str] | None) -> list[Finding]:
    findings: list[Finding] = []
    stray: list[str] = []
    severity = "warning" if folder.name == FOLDERS["test"] else "error"
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []:
        message = None
        if entry.name.endswith(ending):
            if entry.is_symlink() and not os.path.exists(entry.path):
                message = f"is a link to {os.readlink(entry.path)}, which does not exist"
            elif entry.name.startswith("."):
                message = "hidden file with the ending of the data set, nnU-Net would take it for a case; delete it"
            elif name_rule and not name_rule.fullmatch(entry.name):
                message = f"name does not match <case>_XXXX{ending} (XXXX: channel, 0000 the first)"
            elif not entry.is_file():
                stray.append(entry.name)
        elif entry.name.lower().endswith(_IMAGE_ENDINGS) and not entry.name.startswith("."):
            message = f"other format than file_ending {ending} of dataset.json; convert it or move it away"
        elif not entry.name.startswith(".") and not entry.name.endswith(".json"):
            stray.append(entry.name)
        if message:
            findings.append(Finding(severity, short_path(entry.path), message))  # type: ignore[arg-type]
    if stray:
        names = ", ".join(stray[:3]) + (", ..." if len(stray) > 3 else "")
        findings.append(Finding("warning", folder.name, f"{len(stray)} entries are not used: {names}"))
    return findings


def _labels_without_image(raw: RawDataset) -> list[Finding]:
    folder = raw.folder / "labelsTr"
    findings = []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        case = name[: -len(raw.file_ending)]
        if name.endswith(raw.file_ending) and not name.startswith(".") and case not in raw.labeled:
            fix = "move its image from imagesUn to imagesTr" if case in raw.unlabeled else "move it away"
            findings.append(Finding("error", f"labelsTr/{name}", f"label without image in imagesTr; {fix}"))
    return findings


def _check_case_lists(raw: RawDataset) -> list[Finding]:
    findings = []
    if not raw.labeled:
        findings.append(Finding("error", raw.name, "no labeled case (imagesTr with labelsTr)"))
    declared = raw.dataset_json["numTraining"]
    if raw.labeled and declared != len(raw.labeled):
        message = f"numTraining is {declared}, but there are {len(raw.labeled)} labeled cases; correct the number"
        findings.append(Finding("warning", "dataset.json", message))
    findings += [
        Finding("error", case, "case is labeled and unlabeled (imagesTr and imagesUn); delete it from imagesUn")
        for case in raw.labeled
        if case in raw.unlabeled
    ]
    for case in raw.test:
        if case in raw.labeled or case in raw.unlabeled:
            folder = FOLDERS["labeled"] if case in raw.labeled else FOLDERS["unlabeled"]
            findings.append(Finding("warning", case, f"a case of this name is in imagesTs and in {folder}"))
    return findings


def _check_dimensions(facts: list[CaseFacts]) -> list[Finding]:
    known = [case for case in facts if case.dimension is not None]
    dimensions = Counter(case.dimension for case in known)
    if len(dimensions) < 2:
        return []
    usual = dimensions.most_common(1)[0][0]
    return [
        Finding(
            "warning" if case.kind == "test" else "error",
            f"{FOLDERS[case.kind]}/{case.case}",
            f"image is {case.dimension}D, {dimensions[usual]} of {len(known)} cases are {usual}D",
        )
        for case in known
        if case.dimension != usual
    ]


def _check_duplicates(facts: list[CaseFacts]) -> list[Finding]:
    same_content: dict[str, list[CaseFacts]] = defaultdict(list)
    for case in facts:
        if case.content is not None:
            same_content[case.content].append(case)
    findings = []
    for cases in same_content.values():
        # the same name in imagesTr and imagesUn has its own error
        if len(cases) < 2 or (len({case.case for case in cases}) == 1 and all(case.kind != "test" for case in cases)):
            continue
        first, *others = [f"{FOLDERS[case.kind]}/{case.case}" for case in cases]
        kinds = {case.kind for case in cases}
        if kinds >= {"labeled", "test"}:
            message = f"labeled image is also a test image: {', '.join(others)}; delete one of them"
            findings.append(Finding("error", first, message))
            continue
        message = f"same image as {', '.join(others)}"
        if kinds == {"unlabeled", "test"}:
            message += "; training will see the test image (without label)"
        findings.append(Finding("warning" if kinds == {"test"} else "suspicious", first, message))
    return findings


def _check_classes(raw: RawDataset, facts: list[CaseFacts]) -> list[Finding]:
    """Empty labels, and classes that occur in no label. Silent about cases whose label could not be read."""
    read = [case for case in facts if case.found_labels is not None]
    if not read:
        return []
    not_foreground = {0, raw.ignore_label}
    empty = [case for case in read if case.found_labels and case.found_labels <= not_foreground]
    if len(empty) == len(read) == len(raw.labeled):
        return [Finding("error", "labelsTr", "every label is empty, no voxel belongs to a foreground class")]
    findings = [
        Finding("suspicious", short_path(raw.labeled[case.case].label), "label is empty, no foreground")
        for case in empty
    ]
    if len(read) == len(raw.labeled):
        seen = frozenset().union(*(case.found_labels or frozenset() for case in read))
        absent = [value for value in raw.label_values if value not in seen | not_foreground]
        if absent:
            names = ", ".join(_class_name(raw, value) for value in absent)
            findings.append(Finding("warning", "labelsTr", f"no label contains {names}; it cannot be learned"))
    return findings


def _class_name(raw: RawDataset, value: int) -> str:
    named = [name for name, declared in raw.dataset_json["labels"].items() if declared in (value, [value])]
    return f"{named[0]} ({value})" if named else f"the value {value}"
