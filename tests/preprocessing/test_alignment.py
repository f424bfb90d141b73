"""From images that show different sections of the body to positions that correspond."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import affine_transform, gaussian_filter

from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.preprocessing import alignment
from nnssl.preprocessing.alignment import ALIGNMENT_FOLDER, alignment_summary, frame_of, load_frames
from nnssl.preprocessing.manifest import Manifest
from nnssl.preprocessing.pipeline import prepare_dataset
from nnssl.preprocessing.registration import expected_seconds
from nnssl.utils.files import read_json
from nnssl.utils.paths import preprocessed_folder
from tests.preprocessing.raw_data import NAME, write_dataset

CPU = "nnSSLPlannerCPU"
SPACING = [1.0, 1.0, 1.0]


def texture(shape=(30, 32, 34)) -> np.ndarray:
    """Smooth blobs, so that every place looks different."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=shape), 3)
    return (100 + 100 * noise / noise.std()).astype(np.float32)


@pytest.mark.parametrize("kind", ["affine", "deformable"])
def test_a_shifted_image_is_found_and_spacing_is_heeded(kind):
    whole = texture((36, 36, 36))
    reference, case = whole[:30, 3:33, 2:32], whole[4:34, 1:31, 4:34]
    frame = frame_of((reference, SPACING), (case, SPACING), kind)
    point = np.array([0.4, 0.5, 0.6])
    np.testing.assert_allclose(frame.from_common(point), point + np.array([-4, 2, -2]) / 30, atol=0.02)
    # the same image with voxels half as long along one axis
    longer = frame_of((reference, SPACING), (np.repeat(case, 2, 2), [1.0, 1.0, 0.5]), kind)
    np.testing.assert_allclose(longer.from_common(point), frame.from_common(point), atol=0.02)


def test_2d_images_stay_in_their_plane():
    whole = texture((1, 60, 60))
    for kind in ("affine", "deformable"):
        frame = frame_of((whole[:, :50, :50], SPACING), (whole[:, 6:56, 2:52], SPACING), kind)
        found = frame.from_common(np.array([0.5, 0.5, 0.5]))
        np.testing.assert_allclose(found, [0.5, 0.5 - 6 / 50, 0.5 - 2 / 50], atol=0.03)


def test_an_affine_frame_is_that_of_the_transform():
    reference = texture((32, 32, 32))
    scaled = affine_transform(reference, np.diag([0.9, 0.9, 0.9]), offset=1.6, order=1)
    frame = frame_of((reference, SPACING), (scaled, SPACING), "affine")
    np.testing.assert_allclose(np.diag(frame.matrix), 1 / 0.9, atol=0.06)
    assert frame.displacement is None


@pytest.mark.parametrize("slices", [32, 1])
@pytest.mark.parametrize("kind", ["affine", "deformable"])
def test_a_case_that_is_stored_mirrored(tmp_path, kind, slices):
    # its own mirror image, so that only the direction tells left from right
    half = texture((slices, 32, 16))
    image = sitk.GetImageFromArray(np.concatenate([half, half[..., ::-1]], axis=2))
    sitk.WriteImage(image, str(tmp_path / "reference.nii.gz"))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "case.nii.gz"))
    manifest = Manifest.open(tmp_path / "manifest.json", tmp_path, "settings")
    align = alignment.CaseAligner([str(tmp_path / "reference.nii.gz")], kind, SimpleITKIO, manifest)
    align("case", [str(tmp_path / "case.nii.gz")], {})
    point = np.array([0.5, 0.4, 0.3])
    found = alignment.read_frame(tmp_path / "case.npz").from_common(point)
    np.testing.assert_allclose(found, [0.5, 0.4, 0.7], atol=0.02)


@pytest.fixture
def shifted(raw_root) -> Path:
    """Three labeled cases: the same scene in windows that differ by up to a third."""
    folder = write_dataset(raw_root, labeled=3, unlabeled=1)
    whole = texture((40, 34, 32))
    for case, start in (("l0", 0), ("l1", 5), ("l2", 10)):
        window = whole[start : start + 30]
        label = np.zeros(window.shape, np.uint8)
        label[16 - start : 22 - start, 10:18, 10:18] = 1
        label[16 - start : 22 - start, 18:26, 18:26] = 2
        sitk.WriteImage(sitk.GetImageFromArray(window), str(folder / "imagesTr" / f"{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labelsTr" / f"{case}.nii.gz"))
    return folder


def prepare(**options) -> dict:
    return prepare_dataset(NAME, planner=CPU, configurations=["3d_fullres"], preprocess=False, **options).plans


def correspondence(plans: dict) -> tuple[str, dict]:
    block = plans["configurations"]["3d_fullres"]["semi_supervised"]
    return block["atlas_correspondence"], block["atlas_evidence"]["overlap"]


def test_alignment_is_measured_made_once_and_kept_up_to_date(shifted, monkeypatch):
    kind, overlap = correspondence(prepare())
    assert set(overlap) == {"relative", "bbox"}
    assert kind == "bbox"
    assert overlap["bbox"]["dice"] == 1

    made: list[str] = []
    real = alignment.CaseAligner.__call__
    monkeypatch.setattr(
        alignment.CaseAligner, "__call__", lambda self, case, *rest: made.append(case) or real(self, case, *rest)
    )
    _, overlap = correspondence(prepare(align_atlases="affine"))
    assert overlap["registration"]["dice"] > 0.75 > overlap["relative"]["dice"]
    assert sorted(made) == ["l0", "l1", "l2"]
    folder = preprocessed_folder() / NAME
    assert alignment_summary(folder)["reference"] == "l1"
    frames = load_frames(folder, "registration", ["l0", "l2"], (0, 1, 2))
    np.testing.assert_allclose(frames["l2"].from_common(np.full(3, 0.5)), [0.5 - 5 / 30, 0.5, 0.5], atol=0.03)

    made.clear()
    assert "registration" in correspondence(prepare())[1]
    assert made == []
    image = shifted / "imagesTr" / "l2_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(image)) * 1.5, str(image))
    prepare()
    assert made == ["l2"]
    assert "registration" not in correspondence(prepare(align_atlases="none"))[1]
    assert not (folder / ALIGNMENT_FOLDER).exists()


def test_a_killed_alignment_goes_on(shifted, monkeypatch):
    prepare()
    made: list[str] = []
    real = alignment.CaseAligner.__call__

    def until_killed(self, case, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(case)
        real(self, case, *rest)

    monkeypatch.setattr(alignment.CaseAligner, "__call__", until_killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(align_atlases="affine")
    assert alignment_summary(preprocessed_folder() / NAME) is None
    again: list[str] = []
    monkeypatch.setattr(
        alignment.CaseAligner, "__call__", lambda self, case, *rest: again.append(case) or real(self, case, *rest)
    )
    prepare(align_atlases="affine")
    assert sorted(made + again) == ["l0", "l1", "l2"]


def test_labels_that_change_are_measured_again_without_registration(shifted, monkeypatch):
    _, before = correspondence(prepare(align_atlases="affine"))
    monkeypatch.setattr(alignment.CaseAligner, "__call__", None)
    label = shifted / "labelsTr" / "l2.nii.gz"
    changed = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    changed[changed == 2] = 0
    sitk.WriteImage(sitk.GetImageFromArray(changed), str(label))
    _, after = correspondence(prepare())
    assert after["registration"]["dice"] < before["registration"]["dice"]


def test_boxes_of_the_fingerprint_become_frames(shifted):
    prepare()
    frames = load_frames(preprocessed_folder() / NAME, "bbox", ["l0"], (2, 1, 0))
    np.testing.assert_allclose(frames["l0"].from_common(np.zeros(3)), [10 / 32, 10 / 34, 16 / 30])
    np.testing.assert_allclose(frames["l0"].from_common(np.ones(3)), [26 / 32, 26 / 34, 22 / 30])
    assert load_frames(preprocessed_folder() / NAME, "relative", ["l0"], (0, 1, 2)) == {}


def test_what_was_not_made_is_told(shifted):
    prepare()
    folder = preprocessed_folder() / NAME
    with pytest.raises(UserError, match="by registration") as caught:
        load_frames(folder, "registration", ["l0"], (0, 1, 2))
    assert "--align-atlases" in caught.value.fix
    with pytest.raises(UserError, match="by bbox"):
        load_frames(folder, "bbox", ["l9"], (0, 1, 2))
    fingerprint = read_json(folder / "dataset_fingerprint.json")
    del fingerprint["class_places"]
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.raises(UserError, match="where the classes lie"):
        load_frames(folder, "bbox", ["l0"], (0, 1, 2))


def test_an_image_without_contrast_and_a_single_case_are_refused(shifted):
    prepare()
    image = shifted / "imagesTr" / "l2_0000.nii.gz"
    flat = sitk.Image(sitk.ReadImage(str(image)).GetSize(), sitk.sitkFloat32) + 1
    sitk.WriteImage(flat, str(image))
    with pytest.raises(UserError, match="cannot be aligned") as caught:
        prepare(align_atlases="affine", allow_suspicious=True)
    assert "case l2" in str(caught.value.where)
    for case in ("l1", "l2"):
        (shifted / "imagesTr" / f"{case}_0000.nii.gz").unlink()
        (shifted / "labelsTr" / f"{case}.nii.gz").unlink()
    content = read_json(shifted / "dataset.json") | {"numTraining": 1}
    (shifted / "dataset.json").write_text(json.dumps(content))
    assert len(RawDataset.open(NAME).labeled) == 1
    with pytest.raises(UserError, match="nothing to align"):
        prepare(align_atlases="affine")


@pytest.mark.parametrize(
    ("shape", "measured"), [((36, 50, 35), 1.8), ((67, 89, 68), 9.0), ((197, 244, 189), 18.4), ((512, 512, 1), None)]
)
def test_expected_seconds_are_near_those_that_were_measured(shape, measured):
    if measured is None:
        assert expected_seconds(shape) < expected_seconds((96, 96, 96)), "large images are shrunk"
    else:
        assert measured / 1.5 < expected_seconds(shape) < measured * 1.5
