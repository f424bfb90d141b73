from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io

from nnssl.dataset.volumes import Geometry, UnusableFile, read_volume

from .synthetic import SHAPE, voxels, write_volume

ROTATED = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def geometry_of(tmp_path, reader=SimpleITKIO, **geometry):
    write_volume(tmp_path / "x.nii.gz", voxels(0), **geometry)
    return read_volume(str(tmp_path / "x.nii.gz"), reader).geometry


def test_reads_what_nnunet_reads(tmp_path):
    write_volume(tmp_path / "x.nii.gz", voxels(0), spacing=(1.0, 1.5, 2.0), origin=(5, -3, 2), direction=ROTATED)
    volume = read_volume(str(tmp_path / "x.nii.gz"), SimpleITKIO)
    array, geometry = volume.array, volume.geometry
    np.testing.assert_array_equal(array[0], voxels(0))
    assert geometry.shape == SHAPE
    assert geometry.spacing == (2.0, 1.5, 1.0)
    assert geometry.dimension == 3
    np.testing.assert_allclose(geometry.origin(), (5, -3, 2))
    np.testing.assert_allclose(geometry.direction().ravel(), ROTATED, atol=1e-6)
    assert geometry.is_orthonormal()


def test_both_nifti_readers_see_the_same_differences(tmp_path):
    for reader in (SimpleITKIO, NibabelIO):
        base = geometry_of(tmp_path, reader)
        assert base.differences(base) == []
        assert len(geometry_of(tmp_path, reader, origin=(0, 0, 4)).differences(base)) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"spacing": (1.0, 1.5, 2.1)}, ["spacing (2.1, 1.5, 1.0) instead of (2.0, 1.5, 1.0) mm"]),
        ({"origin": (0, 0, 0.5)}, ["origin (0.0, 0.0, 0.5) instead of (0.0, 0.0, 0.0) mm", "corners up to 0.5 mm"]),
        ({"direction": ROTATED}, ["direction", "corners up to"]),
        ({"origin": (0, 0, 0.05)}, []),
        ({"spacing": (1.0, 1.5, 2.000001)}, []),
    ],
)
def test_differences(tmp_path, change, told):
    found = geometry_of(tmp_path, **change).differences(geometry_of(tmp_path))
    assert len(found) == len(told)
    assert all(expected in text for expected, text in zip(told, found, strict=True))


def test_corner_distance_grows_with_a_slight_rotation(tmp_path):
    angle = 0.05
    turned = (np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1)
    found = geometry_of(tmp_path, direction=turned).differences(geometry_of(tmp_path))
    # the far corner lies at (6 mm, 10.5 mm) from the axis and moves by 2 sin(angle / 2) times that
    assert f"{2 * np.sin(angle / 2) * np.hypot(6, 10.5):.3g} mm" in found[-1]


def test_shape_is_told_alone():
    a = Geometry((4, 4, 4), (1, 1, 1), np.eye(4), 3)
    b = Geometry((4, 4, 5), (2, 1, 1), np.eye(4), 3)
    assert a.differences(b) == ["shape (4, 4, 4) instead of (4, 4, 5)"]


def test_sheared_axes(tmp_path):
    image = sitk.GetImageFromArray(voxels(0))
    image.SetDirection((1, 0.3, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "x.mha"))
    assert not read_volume(str(tmp_path / "x.mha"), SimpleITKIO).geometry.is_orthonormal()


@pytest.mark.parametrize(("reader", "replaced"), [(SimpleITKIO, 2), (NibabelIO, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_the_reader_replaces_are_counted(tmp_path, reader, replaced, dtype):
    # more than one chunk, and values on both sides of its border
    array = np.zeros((70, 80, 90), dtype)
    array.ravel()[[(1 << 20) // array.itemsize - 88, -1]] = np.nan, np.inf
    write_volume(tmp_path / "x.nii.gz", array)
    volume = read_volume(str(tmp_path / "x.nii.gz"), reader)
    assert volume.replaced_values == replaced
    assert np.isfinite(volume.array).sum() == array.size - 2 + replaced


def test_values_are_counted_across_the_borders_of_chunks(tmp_path):
    array = np.zeros((70, 80, 90), np.float64)
    write_volume(tmp_path / "x.nii", array)
    header = bytearray((tmp_path / "x.nii").read_bytes()[:348])
    # data that begin at an odd byte: the voxel at the border of two chunks is torn
    header[108:112] = np.float32(357).tobytes()
    array.ravel()[((1 << 20) - 357) // 8] = np.nan
    (tmp_path / "x.nii").write_bytes(bytes(header) + bytes(9) + array.tobytes())
    assert read_volume(str(tmp_path / "x.nii"), SimpleITKIO).replaced_values == 1


def test_uncompressed_and_version_2_nifti(tmp_path):
    nibabel.save(nibabel.Nifti2Image(voxels(0).T, np.eye(4)), tmp_path / "x.nii")
    np.testing.assert_array_equal(read_volume(str(tmp_path / "x.nii"), NibabelIO).array[0], voxels(0))
    data = (tmp_path / "x.nii").read_bytes()
    (tmp_path / "x.nii").write_bytes(data[:-1])
    with pytest.raises(UnusableFile, match=f"{len(data) - 1} of {len(data)} bytes"):
        read_volume(str(tmp_path / "x.nii"), NibabelIO)


def test_two_dimensional_images(tmp_path):
    io.imsave(tmp_path / "rgb.png", np.arange(60, dtype=np.uint8).reshape(4, 5, 3), check_contrast=False)
    volume = read_volume(str(tmp_path / "rgb.png"), NaturalImage2DIO)
    array, geometry = volume.array, volume.geometry
    assert array.shape == (3, 1, 4, 5)
    assert (geometry.dimension, geometry.affine) == (2, None)
    write_volume(tmp_path / "flat.nii.gz", voxels(0, (6, 7)), origin=(1, 2))
    volume = read_volume(str(tmp_path / "flat.nii.gz"), SimpleITKIO)
    array, geometry = volume.array, volume.geometry
    assert (array.shape, geometry.dimension) == ((1, 1, 6, 7), 2)
    np.testing.assert_allclose(geometry.origin(), (1, 2))


def damage(kind: str, path) -> None:
    """Turns the sound image at ``path`` into a broken one."""
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "broken link":
        path.unlink()
        path.symlink_to("gone.nii.gz")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "truncated inside":
        path.write_bytes(gzip.compress(gzip.decompress(data)[:700]))
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "4D":
        sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(voxels(i)) for i in range(2)]), str(path))
    elif kind == "vector":
        sitk.WriteImage(sitk.Compose(*[sitk.GetImageFromArray(voxels(i)) for i in range(2)]), str(path))
    elif kind == "zero spacing":
        image = nibabel.load(path)
        image.header["pixdim"][1] = 0
        path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes("F")))
    elif kind == "sheared":
        affine = np.eye(4)
        affine[0, 1] = 0.4
        image = nibabel.Nifti1Image(voxels(0).T, None)
        image.set_sform(affine, 1)
        image.set_qform(None, 0)
        nibabel.save(image, path)


DAMAGES = {
    "missing": "file not found",
    "empty": "0 bytes",
    "broken link": "is a link to gone.nii.gz, which does not exist",
    "truncated": "truncated or damaged",
    "truncated inside": "file is truncated: 700 of",
    "text": "truncated or damaged",
    "4D": "not one 2D or 3D scalar image",
    "vector": "not one 2D or 3D scalar image",
    "zero spacing": "spacing in the header is zero",
    "sheared": "not orthonormal",
}


@pytest.mark.parametrize(("kind", "message"), DAMAGES.items(), ids=DAMAGES)
def test_unusable_files(tmp_path, kind, message):
    path = tmp_path / "x.nii.gz"
    write_volume(path, voxels(0))
    damage(kind, path)
    with pytest.raises(UnusableFile) as error:
        read_volume(str(path), SimpleITKIO)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
