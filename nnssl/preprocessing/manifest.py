"""What lies finished in a folder of preprocessed cases, and what it was made from."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from nnssl.utils.files import write_json

MANIFEST_FILE = "manifest.json"
_ARRAY_ENDINGS = (".b2nd", ".pkl", ".npz", ".npy")


class Manifest:
    """Finished cases of one folder.

    The file says by which settings the cases were made and, for each case, the content keys of what it was made from
    and the sizes of its files. While cases are being made, every worker appends its finished ones to a journal of
    its own, so that a run that is killed loses none of them; `open` reads the journals, `save` makes one file again.

    Args:
        file: the manifest.
        folder: folder of the preprocessed cases.
        settings: key of the rules by which cases are made now; a manifest of other settings counts as empty.
    """

    def __init__(self, file: Path, folder: Path, settings: str):
        self.file = file
        self.folder = folder
        self.settings = settings
        self.cases: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, file: Path, folder: Path, settings: str) -> Manifest:
        manifest = cls(file, folder, settings)
        content = _read(file)
        if content.get("settings") == settings:
            manifest.cases.update(content.get("cases", {}))
        for journal in manifest._journals():
            for line in journal.read_text(encoding="utf-8").splitlines():
                entry = _parse(line)
                if entry.get("settings") == settings:
                    manifest.cases[entry["case"]] = entry["entry"]
        return manifest

    def holds(self, case: str, content: dict[str, str]) -> bool:
        """Whether the case was made from this content and its files are all there in their full size."""
        entry = self.cases.get(case)
        return entry is not None and entry["content"] == content and self._intact(entry["files"])

    def keep_only(self, cases: set[str], *, complete: bool = True) -> list[str]:
        """Forgets all other cases and deletes every array and property file that belongs to none of ``cases``.

        ``complete`` as in `save`. Returns the names of the cases that were forgotten.
        """
        forgotten = sorted(set(self.cases) - cases)
        self.cases = {case: entry for case, entry in self.cases.items() if case in cases}
        self.save(complete=complete)
        vouched = {name for entry in self.cases.values() for name in entry["files"]}
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if path.name.endswith(_ARRAY_ENDINGS) and path.name not in vouched:
                path.unlink()
        return forgotten

    def add(self, case: str, content: dict[str, str], files: dict[str, int]) -> None:
        """Records a finished case in the journal of this process."""
        entry = {"content": content, "files": files}
        line = json.dumps({"settings": self.settings, "case": case, "entry": entry})
        with open(self.file.with_name(f"{self.file.stem}.{os.getpid()}.journal"), "a", encoding="utf-8") as journal:
            journal.write(line + "\n")

    def save(self, *, complete: bool = True) -> None:
        """Writes the manifest and removes the journals, whose entries it holds since `open`.

        ``complete`` is False while cases are still to be made, so that nobody takes a part for the whole.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        cases = dict(sorted(self.cases.items()))
        write_json({"settings": self.settings, "complete": complete, "cases": cases}, self.file)
        for journal in self._journals():
            journal.unlink()

    def damaged(self) -> list[str]:
        """Cases with a file that is missing or has another size than when it was made."""
        return [case for case, entry in self.cases.items() if not self._intact(entry["files"])]

    def _journals(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.stem)}.*.journal"))

    def _intact(self, files: dict[str, int]) -> bool:
        try:
            return all(os.stat(self.folder / name).st_size == size for name, size in files.items())
        except OSError:
            return False


def stored_settings(file: Path) -> str | None:
    """Settings key of a manifest; None if there is none."""
    return _read(file).get("settings")


def was_interrupted(file: Path) -> bool:
    """Whether cases of a manifest are still to be made."""
    return _read(file).get("complete") is False


def _read(file: Path) -> dict[str, Any]:
    # a broken or lost manifest only means that cases are made again
    return _parse(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
