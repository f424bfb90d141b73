from __future__ import annotations

import copy
import json
import os

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.preprocessing.content import content_keys, hash_files, settings_key
from tests.preprocessing.raw_data import write_dataset, write_image

INTENSITIES = {"mean": 1.0, "std": 1.0, "percentile_00_5": 0.0, "percentile_99_5": 2.0}


def key(plans: dict, labels: dict | None = None) -> str:
    manager = PlansManager(plans)
    return settings_key(manager, manager.get_configuration("3d_fullres"), labels)


@pytest.fixture
def plans() -> dict:
    resampling = {"is_seg": False, "order": 3}
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "architecture": {},
        "patch_size": [16, 16, 16],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": resampling,
    }
    return {
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": dict(INTENSITIES)},
        "configurations": {"3d_fullres": configuration},
    }


def changed(plans: dict, **values: object) -> dict:
    other = copy.deepcopy(plans)
    other["configurations"]["3d_fullres"].update(values)
    return other


def test_hash_follows_the_content_behind_a_link(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files = [str(tmp_path / name) for name in ("a", "b", "c", "link")]
    a, b, c, link = hash_files(files, tmp_path / "cache.json", num_threads=2).values()
    assert a == b == link != c


def test_unchanged_file_is_not_read_again_unless_clean(tmp_path):
    file, cache = tmp_path / "a", tmp_path / "cache.json"
    file.write_text("content")
    true = hash_files([str(file)], cache, num_threads=1)[str(file)]
    remembered = json.loads(cache.read_text())
    remembered[str(file)]["content"] = "from the cache"
    cache.write_text(json.dumps(remembered))
    assert hash_files([str(file)], cache, num_threads=1)[str(file)] == "from the cache"
    assert hash_files([str(file)], cache, num_threads=1, clean=True)[str(file)] == true


def test_file_of_same_size_and_time_but_other_content_is_seen(tmp_path):
    file, cache = tmp_path / "a", tmp_path / "cache.json"
    file.write_text("abc")
    before = hash_files([str(file)], cache, num_threads=1)
    status = file.stat()
    file.write_text("xyz")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_files([str(file)], cache, num_threads=1) != before


def test_broken_cache_costs_time_only(tmp_path):
    file, cache = tmp_path / "a", tmp_path / "cache.json"
    file.write_text("abc")
    before = hash_files([str(file)], cache, num_threads=1)
    cache.write_text("{broken")
    assert hash_files([str(file)], cache, num_threads=1) == before


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        hash_files([str(tmp_path / "nowhere")], tmp_path / "cache.json", num_threads=1)


def test_keys_of_cases(raw_root, tmp_path):
    folder = write_dataset(raw_root, channels=("T1", "T2"))
    keys = content_keys(RawDataset.open(folder), tmp_path / "cache.json", num_threads=1)
    assert set(keys.images) == {"l0", "l1", "u0", "u1", "u2"}
    assert set(keys.labels) == {"l0", "l1"}
    assert len(set(keys.images.values())) == 5
    assert set(keys.of("l0")) == {"image", "label"}
    assert set(keys.of("u0")) == {"image"}
    write_image(folder, "u1", seed=99, channels=2)
    again = content_keys(RawDataset.open(folder), tmp_path / "cache.json", num_threads=1)
    assert {case for case in keys.images if keys.images[case] != again.images[case]} == {"u1"}


@pytest.mark.parametrize(
    "values",
    [
        {"spacing": [1.0, 1.0, 2.0]},
        {"normalization_schemes": ["NoNormalization"]},
        {"use_mask_for_norm": [True]},
        {"preprocessor_name": "Other"},
        {"resampling_fn_data": "other"},
        {"resampling_fn_seg_kwargs": {"order": 0}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_that_change_the_result_change_the_key(plans, values):
    assert key(changed(plans, **values)) != key(plans)


def test_transpose_reader_and_labels_change_the_key(plans):
    assert key(plans | {"transpose_forward": [2, 0, 1]}) != key(plans)
    assert key(plans | {"image_reader_writer": "NibabelIO"}) != key(plans)
    assert key(plans, {"labels": {"a": 1}}) != key(plans, {"labels": {"a": 2}})


def test_patch_size_does_not_change_the_key(plans):
    assert key(changed(plans, patch_size=[32, 32, 32])) == key(plans)


@pytest.mark.parametrize(("scheme", "depends"), [("ZScoreNormalization", False), ("CTNormalization", True)])
def test_intensities_count_only_where_normalization_uses_them(plans, scheme, depends):
    plans = changed(plans, normalization_schemes=[scheme])
    other = copy.deepcopy(plans)
    other["foreground_intensity_properties_per_channel"]["0"]["mean"] = 7.0
    assert (key(other) != key(plans)) is depends
