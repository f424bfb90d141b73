from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnssl.evaluation import metrics
from nnssl.evaluation.metrics import compare_label_maps, compare_masks, metric_names, nsd_name

SPACING = (2.5, 0.7, 1.2)


def box(shape, *ranges) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def ball(shape, center, radius, spacing) -> np.ndarray:
    axes = [(np.arange(n) * s - c) ** 2 for n, s, c in zip(shape, spacing, center, strict=True)]
    return sum(np.ix_(*axes)) <= radius**2


def blobs(seed: int, dimension: int) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Two similar random masks and a spacing."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(12, 34, dimension))
    one, two = (ndimage.gaussian_filter(rng.normal(size=shape), 2) for _ in range(2))
    return one > 0, one + 0.4 * two > 0.01, tuple(rng.uniform(0.4, 3, dimension).tolist())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_two_voxels_apart(axis, shift):
    """Each has 8 elements of one size: 4 of them are ``shift`` voxels from the other surface, 4 are one less."""
    reference = box((12, 12, 12), (3, 4), (3, 4), (3, 4))
    step = SPACING[axis]
    tolerances = ((shift - 1) * step, (shift - 0.01) * step, shift * step)
    found = compare_masks(reference, np.roll(reference, shift, axis), SPACING, tolerances_mm=tolerances).metrics
    assert found["Dice"] == 0
    assert found["HD95"] == pytest.approx(shift * step)
    assert found["ASSD"] == pytest.approx((shift - 0.5) * step)
    assert [found[nsd_name(t)] for t in tolerances] == pytest.approx([0.5, 0.5, 1])


def test_shifted_boxes():
    reference = box((10, 14, 16), (2, 8), (3, 11), (4, 14))
    prediction = np.roll(reference, 2, axis=0)
    found = compare_masks(reference, prediction, SPACING, tolerances_mm=(4.9, 5.0)).metrics
    assert found["Dice"] == pytest.approx(4 / 6)
    assert found["IoU"] == pytest.approx(4 / 8)
    assert found["HD95"] == pytest.approx(2 * 2.5)
    assert found["NSD@5mm"] == 1
    assert 0.5 < found["NSD@4.9mm"] < 1
    voxel = 2.5 * 0.7 * 1.2
    assert found["volume_reference"] == pytest.approx(6 * 8 * 10 * voxel)
    assert found["volume_error"] == pytest.approx(0)
    assert (found["TP"], found["FP"], found["FN"]) == (4 * 80, 2 * 80, 2 * 80)
    assert found["TN"] == 10 * 14 * 16 - 8 * 80


def test_concentric_balls_with_anisotropic_spacing():
    spacing, shape = (1.0, 0.5, 0.8), (48, 90, 56)
    center = [n * s / 2 for n, s in zip(shape, spacing, strict=True)]
    reference, prediction = (ball(shape, center, radius, spacing) for radius in (12, 16))
    found = compare_masks(reference, prediction, spacing, tolerances_mm=(2.0, 5.0)).metrics
    assert found["Dice"] == pytest.approx(2 * 12**3 / (12**3 + 16**3), rel=0.01)
    # the surfaces are staircases, and the nearest element is on a step: up to half a voxel less
    assert 3.5 < found["ASSD"] < 4
    assert 3.5 < found["HD95"] < 4.5
    assert (found["NSD@2mm"], found["NSD@5mm"]) == (0, 1)
    assert found["volume_error"] == pytest.approx(4 / 3 * np.pi * (16**3 - 12**3), rel=0.01)


def test_identical_masks():
    mask = ball((20, 20, 20), (10, 10, 10), 6, (1, 1, 1))
    found = compare_masks(mask, mask, (1, 1, 1), tolerances_mm=(0.0,)).metrics
    expected = {"Dice": 1, "IoU": 1, "HD95": 0, "ASSD": 0, "NSD@0mm": 1, "volume_error": 0}
    assert {name: found[name] for name in expected} == expected


def test_percentile_leaves_the_farthest_five_percent_out():
    # two voxels far from the rest, and a long rod of which they are less than 5 % of the surface
    reference = box((8, 8, 90), (4, 5), (4, 5), (5, 85))
    outlier = reference.copy()
    outlier[0, 0, 0] = True
    assert compare_masks(reference, outlier, (1, 1, 1)).metrics["HD95"] == 0
    shorter = box((8, 8, 90), (4, 5), (4, 5), (5, 50))
    assert 25 < compare_masks(reference, shorter, (1, 1, 1)).metrics["HD95"] < 35


def test_percentile_takes_the_first_element_that_reaches_it():
    distances = np.array([3.0, 1.0, 2.0, 9.0])
    assert metrics._percentile(distances, np.array([1.0, 90.0, 4.0, 5.0])) == 3
    assert metrics._percentile(distances, np.array([1.0, 89.0, 4.0, 6.0])) == 9
    assert metrics._percentile(np.arange(20.0), np.full(20, 0.1)) == 18


def test_a_tolerance_equal_to_the_spacing_survives_float32_headers():
    reference = box((9, 9, 9), (3, 6), (3, 6), (3, 6))
    step = float(np.float32(1.2))
    assert step > 1.2
    found = compare_masks(reference, np.roll(reference, 1, 0), (step, 1, 1), tolerances_mm=(1.2,)).metrics
    assert found["NSD@1.2mm"] == 1


def test_flat_images_are_two_dimensional():
    reference, prediction = blobs(0, 2)[:2]
    flat = compare_masks(reference, prediction, (0.6, 1.5))
    for axis, spacing in enumerate([(999, 0.6, 1.5), (0.6, 999, 1.5), (0.6, 1.5, 999)]):
        found = compare_masks(np.expand_dims(reference, axis), np.expand_dims(prediction, axis), spacing)
        assert found == flat
    assert flat.metrics["volume_reference"] == pytest.approx(reference.sum() * 0.9)


def test_square_in_two_dimensions():
    reference = box((20, 20), (5, 15), (5, 15))
    found = compare_masks(reference, np.roll(reference, 3, 1), (0.5, 2.0), tolerances_mm=(5.0, 6.0)).metrics
    assert found["Dice"] == pytest.approx(0.7)
    assert found["HD95"] == pytest.approx(6)
    assert found["NSD@6mm"] == 1
    # only the two far edges (9 straight pieces of 0.5 mm each) are 6 mm away, with their cut corners
    far = 2 * (9 * 0.5 + 2 * np.hypot(0.5, 2) / 2)
    perimeter = 2 * (2 * 9 * 0.5 + 2 * 9 * 2.0 + 4 * np.hypot(0.5, 2) / 2)
    assert found["NSD@5mm"] < 1 - 0.9 * far / perimeter


@pytest.mark.parametrize("shape", [(8, 9, 10), (1, 9, 10), (9, 10)])
def test_empty_masks(shape):
    spacing = (2.0, 0.5, 3.0)[-len(shape) :]
    empty = np.zeros(shape, bool)
    full = empty.copy()
    full[..., 2:4, 2:5] = True
    lengths = [n * s for n, s in zip(shape, spacing, strict=True) if n > 1]
    diagonal = np.sqrt(np.sum(np.square(lengths)))
    both = compare_masks(empty, empty, spacing)
    assert both.status == "excluded"
    assert all(np.isnan(both.metrics[name]) for name in ("Dice", "IoU", "HD95", "ASSD", "NSD@1mm"))
    assert both.metrics["volume_reference"] == both.metrics["volume_error"] == 0
    for reference, prediction, sign in ((full, empty, -1), (empty, full, 1)):
        one = compare_masks(reference, prediction, spacing)
        assert one.status == "failure"
        assert [one.metrics[name] for name in ("Dice", "IoU", "NSD@1mm")] == [0, 0, 0]
        assert one.metrics["HD95"] == one.metrics["ASSD"] == pytest.approx(diagonal)
        assert np.sign(one.metrics["volume_error"]) == sign
    assert compare_masks(full, full, spacing).status == "scored"


def label_maps() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    field = ndimage.gaussian_filter(rng.normal(size=(16, 18, 14)), 2)
    other = field + 0.3 * ndimage.gaussian_filter(rng.normal(size=field.shape), 2)
    edges = np.quantile(field, [0.4, 0.6, 0.8])
    return np.digitize(field, edges).astype(np.uint8), np.digitize(other, edges).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_label_maps_equal_their_masks(dtype):
    reference, prediction = label_maps()
    classes = {"one": (1,), "whole": (1, 2, 3), "core": (2, 3), "background": (0,), "absent": (9,)}
    found = compare_label_maps(reference.astype(dtype), prediction.astype(dtype), SPACING, classes)
    assert list(found) == list(classes)
    for name in ("one", "whole", "core", "background"):
        masks = (np.isin(array, classes[name]) for array in (reference, prediction))
        assert found[name] == compare_masks(*masks, SPACING)
    assert found["absent"].status == "excluded"


def test_ignored_voxels_are_in_neither_mask():
    reference, prediction = label_maps()
    ignored = box(reference.shape, (3, 9), (2, 8), (4, 12))
    kept_reference, kept_prediction = (np.where(ignored, 0, array) for array in (reference, prediction))
    reference[ignored] = 4
    classes = {"one": (1,), "core": (2, 3)}
    found = compare_label_maps(reference, prediction, SPACING, classes, ignore_label=4)
    expected = compare_label_maps(kept_reference, kept_prediction, SPACING, classes)
    for name in classes:
        without_tn = {key: value for key, value in found[name].metrics.items() if key != "TN"}
        assert without_tn == {key: value for key, value in expected[name].metrics.items() if key != "TN"}
        assert found[name].metrics["TN"] == expected[name].metrics["TN"] - ignored.sum()
    assert found != compare_label_maps(reference, prediction, SPACING, classes)


def test_a_class_only_under_ignored_voxels_is_excluded():
    reference, prediction = np.full((6, 6), 0), np.zeros((6, 6), int)
    reference[1:4, 1:4] = 2
    prediction[2, 2] = 1
    assert compare_label_maps(reference, prediction, (1, 1), {"a": (1,)}, ignore_label=2)["a"].status == "excluded"


@pytest.mark.parametrize("count", [254, 255, 256, 300])
def test_many_classes(count):
    reference = np.zeros((count + 1, 4), np.uint16)
    reference[1:, 1:3] = np.arange(1, count + 1)[:, None] * 7
    found = compare_label_maps(reference, reference, (1, 1), {str(i): (i * 7,) for i in range(1, count + 1)})
    assert all(score.metrics["Dice"] == 1 and score.metrics["TP"] == 2 for score in found.values())


@pytest.mark.parametrize("dimension", [2, 3])
def test_blocks_and_margins_do_not_matter(monkeypatch, dimension):
    reference, prediction, spacing = blobs(5, dimension)
    expected = compare_masks(reference, prediction, spacing).metrics
    monkeypatch.setattr(metrics, "_BLOCK_VOXELS", 1)
    padded = (np.pad(mask, 3) for mask in (reference, prediction))
    found = compare_masks(*padded, spacing).metrics
    names = [name for name in expected if name != "TN"]
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names])


def test_arguments_are_not_changed():
    reference, prediction = label_maps()
    before = reference.copy(), prediction.copy()
    compare_label_maps(reference, prediction, SPACING, {"a": (1,)}, ignore_label=3)
    np.testing.assert_array_equal(reference, before[0])
    np.testing.assert_array_equal(prediction, before[1])


MAP = np.ones((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": MAP[:3]}, r"shape \(4, 4\), prediction \(3, 4\)"),
        ({"reference": MAP[0], "prediction": MAP[0]}, "2D or 3D"),
        ({"spacing": (1.0,)}, "2 positive values of spacing"),
        ({"spacing": (1.0, 0.0)}, "2 positive values of spacing"),
        ({"reference": MAP * 0.5}, "reference holds float64"),
        ({"prediction": MAP.astype(int) * -1}, "prediction holds values from -1"),
        ({"prediction": MAP.astype(int) * 70000}, "70000"),
        ({"classes": {"a": ()}}, "class a"),
        ({"classes": {"a": (-1,)}}, "class a"),
        ({"classes": {"a": (1, 2)}, "ignore_label": 2}, "contains the ignore label 2"),
        ({"tolerances_mm": (-1.0,)}, "tolerances"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"reference": MAP, "prediction": MAP, "spacing": (1.0, 1.0), "classes": {"a": (1,)}} | change
    with pytest.raises(ValueError, match=message):
        compare_label_maps(**arguments)


def test_names_of_all_metrics():
    found = compare_masks(MAP, MAP, (1, 1), tolerances_mm=(0.5, 2))
    assert list(found.metrics) == metric_names((0.5, 2))


def check_against_surface_distance(reference, prediction, spacing):
    package = pytest.importorskip("surface_distance", reason="surface-distance is not installed (extra dev)")
    found = compare_masks(reference, prediction, spacing, tolerances_mm=(0.5, 1, 2)).metrics
    expected = package.compute_surface_distances(reference, prediction, spacing)
    assert found["HD95"] == pytest.approx(package.compute_robust_hausdorff(expected, 95), abs=1e-6)
    areas = expected["surfel_areas_gt"].sum(), expected["surfel_areas_pred"].sum()
    directed = package.compute_average_surface_distance(expected)
    assert found["ASSD"] == pytest.approx(np.average(directed, weights=areas), abs=1e-6)
    for tolerance in (0.5, 1, 2):
        nsd = package.compute_surface_dice_at_tolerance(expected, tolerance)
        assert found[nsd_name(tolerance)] == pytest.approx(nsd, abs=1e-6)
    assert found["Dice"] == pytest.approx(package.compute_dice_coefficient(reference, prediction), abs=1e-12)


def check_against_monai(reference, prediction, spacing):
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed (extra dev)")
    torch = pytest.importorskip("torch")
    found = compare_masks(reference, prediction, spacing, tolerances_mm=(1.0,)).metrics
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    common = {"include_background": True, "spacing": spacing}
    nsd = monai.compute_surface_dice(*tensors, [1.0], use_subvoxels=True, **common)
    assert found["NSD@1mm"] == pytest.approx(float(nsd), abs=1e-6)
    dice = monai.compute_dice(*tensors, include_background=True)
    assert found["Dice"] == pytest.approx(float(dice), abs=1e-6)
    # MONAI's surface is made of voxels, not of the cells between them
    voxel = max(spacing)
    hd95 = monai.compute_hausdorff_distance(*tensors, percentile=95, **common)
    assert found["HD95"] == pytest.approx(float(hd95), abs=voxel)
    assd = monai.compute_average_surface_distance(*tensors, symmetric=True, **common)
    assert found["ASSD"] == pytest.approx(float(assd), abs=voxel / 3)


@pytest.mark.parametrize("check", [check_against_surface_distance, check_against_monai])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dimension", [2, 3])
def test_agrees_with_other_packages(check, seed, dimension):
    check(*blobs(seed, dimension))


@pytest.mark.data
@pytest.mark.parametrize("check", [check_against_surface_distance, check_against_monai])
@pytest.mark.parametrize("source", ["hippocampus", "acdc_crop"])
def test_agrees_with_other_packages_on_real_masks(real_data, check, source):
    """Labels of a real case, of 1 mm and of thick slices, against themselves smoothed and moved."""
    import SimpleITK

    file = sorted((real_data / source / "labels").glob("*.nii.gz"))[0]
    image = SimpleITK.ReadImage(str(file))
    labels, spacing = SimpleITK.GetArrayFromImage(image), image.GetSpacing()[::-1]
    # MONAI takes spacings as float32
    spacing = tuple(float(np.float32(step)) for step in spacing)
    for value in np.unique(labels[labels > 0]):
        reference = np.pad(labels == value, 2)
        prediction = np.roll(ndimage.binary_opening(reference, iterations=1), (0, 1, -1), (0, 1, 2))
        check(reference, prediction, spacing)
