from __future__ import annotations

import pytest

from nnssl.preprocessing.manifest import Manifest, stored_settings


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    folder = tmp_path / "cases"
    folder.mkdir()
    return Manifest.open(tmp_path / "m.json", folder, "settings")


def finish(manifest: Manifest, case: str, content: str = "1") -> None:
    (manifest.folder / f"{case}.b2nd").write_text("data")
    manifest.add(case, {"image": content}, {f"{case}.b2nd": 4})


def reopened(manifest: Manifest, settings: str = "settings") -> Manifest:
    return Manifest.open(manifest.file, manifest.folder, settings)


def test_finished_cases_survive_without_save(manifest):
    finish(manifest, "a")
    assert not manifest.file.exists()
    assert reopened(manifest).holds("a", {"image": "1"})


def test_save_makes_one_file(manifest):
    finish(manifest, "a")
    reopened(manifest).save()
    assert [path.name for path in manifest.file.parent.iterdir() if path.is_file()] == ["m.json"]
    assert reopened(manifest).holds("a", {"image": "1"})
    assert stored_settings(manifest.file) == "settings"


def test_line_cut_off_by_a_kill_is_ignored(manifest):
    finish(manifest, "a")
    finish(manifest, "b")
    (journal,) = manifest.file.parent.glob("*.journal")
    journal.write_text(journal.read_text()[:-20])
    again = reopened(manifest)
    assert again.holds("a", {"image": "1"})
    assert not again.holds("b", {"image": "1"})


def test_other_settings_start_empty(manifest):
    finish(manifest, "a")
    reopened(manifest).save()
    finish(manifest, "b")
    assert reopened(manifest, "others").cases == {}


def test_other_content_does_not_hold(manifest):
    finish(manifest, "a")
    assert not reopened(manifest).holds("a", {"image": "2"})


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_files_do_not_hold(manifest, damage):
    finish(manifest, "a")
    file = manifest.folder / "a.b2nd"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("dat")
    assert not reopened(manifest).holds("a", {"image": "1"})


def test_keep_only_forgets_and_deletes_everything_it_does_not_vouch_for(manifest):
    finish(manifest, "a")
    finish(manifest, "b")
    (manifest.folder / "stray.pkl").write_text("")
    (manifest.folder / "readme.txt").write_text("")
    assert reopened(manifest).keep_only({"a"}) == ["b"]
    assert {path.name for path in manifest.folder.iterdir()} == {"a.b2nd", "readme.txt"}
    assert set(reopened(manifest).cases) == {"a"}


def test_broken_manifest_counts_as_empty(manifest):
    manifest.file.write_text("{broken")
    assert reopened(manifest).cases == {}
