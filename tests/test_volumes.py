"""Volumes: voxels keep their place, and a file is read right or refused with one message."""

from __future__ import annotations

import gzip
import itertools
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ct_image, random_affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import (
    AFFINE,
    NIFTI_KINDS,
    PACKED_FILES,
    WHOLE_FILES,
    make_array,
    same_place,
    sweep_cuts,
    sweep_flips,
    sweep_nifti_header,
    write_any,
    write_meta,
    write_nifti,
    write_nrrd,
)

from data.files import InputError
from data.volumes import (
    VOLUME_SUFFIXES,
    Volume,
    list_parts,
    list_slabs,
    read_file,
)

SECRET = "DOE^JANE"
AXES = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


# ---------------------------------------------------------------------------------------
# The type
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shear", [0.0, 0.2])
def test_every_voxel_keeps_its_place_through_ras_and_back(shear: float) -> None:
    """All 48 orientations, straight and sheared."""
    for order, signs in AXES:
        affine = random_affine(1, shear=shear, shuffle=False)
        affine[:3, :3] = affine[:3, :3] @ np.eye(3)[list(order)] * signs
        volume = Volume(make_array(), affine)
        ras = volume.ras
        assert ras.axcodes == "RAS"
        assert ras.shape == volume.ras_shape
        assert np.allclose(ras.affine, volume.ras_affine)
        index = (1, 5, 2)
        place = nib.affines.apply_affine(affine, index)
        there = np.rint(nib.affines.apply_affine(np.linalg.inv(ras.affine), place)).astype(int)
        assert ras.data[tuple(there)] == volume.data[index]
        back = volume.from_ras(ras.data)
        assert np.array_equal(back.data, volume.data)
        assert same_place(back, volume)
        slabs = np.zeros(ras.shape, int)
        for first, slab in volume.slabs(list_slabs(ras.shape[2], 4, reach_back=True)):
            slabs[:, :, first : first + slab.shape[2]] = slab
        assert np.array_equal(slabs, ras.data)


def test_slabs_from_a_file_come_in_its_order_and_may_overlap(tmp_path: Path) -> None:
    for signs in ((1, 1, 1), (1, 1, -1)):
        affine = AFFINE * [*signs, 1]
        path = tmp_path / "ct.nii.gz"
        nib.save(nib.Nifti1Image(make_array(), affine), path)
        volume = read_file(path)
        found = list(volume.slabs([(0, 4), (2, 6)]))
        assert [first for first, _ in found] == ([0, 2] if signs[2] > 0 else [2, 0])
        for first, slab in found:
            assert np.array_equal(slab, volume.ras.data[:, :, first : first + 4])
        assert np.array_equal(
            np.concatenate([part for _, part in volume.stored_slabs(4)], 2), make_array()
        )


def test_a_box_keeps_its_place() -> None:
    volume = Volume(make_array(), AFFINE)
    part = volume.crop((slice(2, 7), slice(None), slice(1, None, 2)))
    assert np.array_equal(part.data, volume.data[2:7, :, 1::2])
    assert np.allclose(part.affine @ [0, 0, 1, 1], AFFINE @ [2, 0, 3, 1])


def test_like_keeps_the_grid_and_refuses_another() -> None:
    volume = Volume(make_array(), AFFINE, notes=("a",), classes={"liver": 1})
    other = volume.like(make_array(np.uint8))
    assert same_place(other, volume)
    assert (other.notes, other.classes) == ((), {})
    with pytest.raises(ValueError, match="must have the grid's shape"):
        volume.like(np.zeros((2, 2, 2), np.uint8))


@pytest.mark.parametrize(
    ("array", "affine", "word"),
    [
        (np.zeros((3, 3)), np.eye(4), "3D"),
        (np.zeros((3, 0, 3)), np.eye(4), "3D"),
        (np.zeros((3, 3, 3), complex), np.eye(4), "numbers"),
        (np.zeros((3, 3, 3)), np.eye(3), "affine"),
        (np.zeros((3, 3, 3)), np.diag([1, 1, 0, 1]), "affine"),
        (np.zeros((3, 3, 3)), np.full((4, 4), np.nan), "affine"),
        (np.zeros((3, 3, 3)), np.diag([1, 1, 51, 1]), "spacing"),
        (np.zeros((3, 3, 3)), np.diag([0.01, 1, 1, 1]), "spacing"),
        (np.zeros((3, 3, 3)), nib.affines.from_matvec(np.eye(3), [1e30, 0, 0]), "origin"),
    ],
)
def test_what_is_no_volume_is_refused(array: np.ndarray, affine: np.ndarray, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Volume(array, affine)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused_where_they_are_read(bad: float) -> None:
    array = make_array(np.float32)
    array[1, 2, 3] = bad
    volume = Volume(array, AFFINE)
    for read in (volume.read, lambda: volume.ras, lambda: list(volume.slabs([(3, 4)]))):
        with pytest.raises(InputError, match="NaN or infinite") as caught:
            read()
        assert caught.value.kind == "nan"


# ---------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [(1, 2), (0, 2), (1, 0), (0, 0), (4, 4)])
@pytest.mark.parametrize("unit", ["mm", "meter", "micron", "unknown"])
def test_form_codes_and_unit_are_written_again(tmp_path: Path, codes, unit: str) -> None:
    image = nib.Nifti1Image(make_array(), None)
    per_mm = {"meter": 0.001, "micron": 1000}.get(unit, 1)
    affine = np.diag([per_mm, per_mm, per_mm, 1]) @ AFFINE
    image.header["pixdim"][1:4] = nib.affines.voxel_sizes(affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "in.nii")
    volume = read_file(tmp_path / "in.nii")
    if codes != (0, 0):
        assert np.allclose(volume.affine, AFFINE, atol=1e-4)
    assert volume.oriented == (codes != (0, 0))
    volume.like(make_array(np.uint8)).write_checked(tmp_path / "out.nii.gz")
    written = read_file(tmp_path / "out.nii.gz")
    assert form_codes(written) == codes
    assert np.allclose(written.affine, volume.affine, atol=1e-4)
    assert nib.load(tmp_path / "out.nii.gz").header.get_xyzt_units()[0] == unit


def test_slabs_are_written_as_the_whole_volume_is(tmp_path: Path) -> None:
    grid = read_file(write_nifti(tmp_path / "grid.nii"))
    grid.write(tmp_path / "whole.nii.gz")
    write_slabs(tmp_path / "a.nii.gz", grid, np.int16, (part for _, part in grid.stored_slabs(4)))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "whole.nii.gz").read_bytes()
    for slabs in ([], [make_array()[:, :, :3]], [make_array(), make_array()]):
        with pytest.raises(ValueError, match="slabs must hold"):
            write_slabs(tmp_path / "b.nii.gz", grid, np.int16, slabs)
    with pytest.raises(ValueError, match="slab must be"):
        write_slabs(tmp_path / "b.nii.gz", grid, np.int16, [make_array(np.uint8)])
    assert not [*tmp_path.glob("*b.nii*"), *tmp_path.glob(".*")]


@pytest.mark.parametrize("step", ["voxels", "header"])
def test_what_changes_in_writing_is_not_kept(tmp_path: Path, monkeypatch, step: str) -> None:
    import data.volumes

    true_read = data.volumes.read_file

    def damage(path: Path) -> Volume:
        content = bytearray(path.read_bytes())
        position = -3 if step == "voxels" else 280 + 3
        content[position] ^= 1
        path.write_bytes(content)
        return true_read(path)

    monkeypatch.setattr(data.volumes, "read_file", damage)
    with pytest.raises(InputError, match="changed in writing"):
        Volume(make_array(), AFFINE).write_checked(tmp_path / "out.nii")
    assert list(tmp_path.iterdir()) == []


def test_a_scaled_volume_is_written_with_its_slope(tmp_path: Path) -> None:
    Volume(make_array(np.uint8), AFFINE).write_checked(tmp_path / "p.nii.gz", slope=1 / 255)
    found = read_file(tmp_path / "p.nii.gz").read()
    assert np.allclose(found, make_array() / 255, atol=1e-6)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".hdr"])
def test_no_text_of_the_input_is_written(tmp_path: Path, ending: str) -> None:
    """Descriptions, names and extensions may hold what identifies a patient."""
    kind = nib.Nifti1Pair if ending == ".hdr" else nib.Nifti1Image
    image = kind(make_array(), AFFINE)
    for key in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[key] = SECRET.encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET.encode()))
    nib.save(image, tmp_path / f"in{ending}")
    volume = read_file(tmp_path / f"in{ending}")
    volume.like(make_array(np.uint8)).write_checked(tmp_path / "a.nii")
    volume.ras.write(tmp_path / "b.nii")
    volume.crop((slice(2), slice(2), slice(2))).write(tmp_path / "c.nii")
    nib.save(volume.to_nibabel(), tmp_path / "d.nii")
    for name in "abcd":
        assert SECRET.encode() not in (tmp_path / f"{name}.nii").read_bytes()


# ---------------------------------------------------------------------------------------
# NIfTI: each field of the header × what may stand there
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", NIFTI_KINDS, ids=lambda base: f"{base[0]}-{base[1].__name__}-{base[2]}"
)
def test_a_header_field_of_nonsense_gives_the_right_volume_or_one_error(base, tmp_path) -> None:
    counts = sweep_nifti_header(tmp_path, base, number=50)
    assert counts["refused"] > 3
    assert counts["right"] > 3


def test_units_and_forms_that_disagree_are_told(tmp_path: Path) -> None:
    image = ct_image(make_array(), AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] += 3
    image.set_qform(moved, 1)
    nib.save(image, tmp_path / "a.nii")
    volume = read_file(tmp_path / "a.nii")
    assert np.allclose(volume.affine, AFFINE, atol=1e-4)
    assert "sform and qform disagree" in volume.notes[0]
    image.set_qform(AFFINE, 1)
    image.header["xyzt_units"] = 5
    nib.save(image, tmp_path / "b.nii")
    assert "unit 5" in read_file(tmp_path / "b.nii").notes[0]
    nib.save(ct_image(make_array(), AFFINE), tmp_path / "c.nii")
    assert read_file(tmp_path / "c.nii").notes == ()


def test_slopes_that_are_no_numbers_mean_no_scaling(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    for slope, inter, factor in ((np.nan, 3, 1), (np.inf, 3, 1), (0, 3, 1), (2, 0, 2), (-1, 0, -1)):
        content[112:120] = np.array([slope, inter], "<f4").tobytes()
        path.write_bytes(content)
        assert np.array_equal(read_file(path).read(), make_array() * factor)
    content[112:120] = np.array([1, np.nan], "<f4").tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match="scl_inter"):
        read_file(path)


# ---------------------------------------------------------------------------------------
# NIfTI: names, pairs, compression, damage
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A.NII.GZ", "A.NII", "a.Nii.gz"])
def test_capitals_in_the_ending(tmp_path: Path, name: str) -> None:
    write_nifti(tmp_path / name.lower()).rename(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / name)
    assert np.array_equal(read_file(tmp_path / name).read(), make_array())


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair, nib.AnalyzeImage])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_a_pair_is_read_by_either_name(tmp_path: Path, kind, packed: bool, upper: bool) -> None:
    kind(make_array(), np.diag([-2.0, 2, 2, 1])).to_filename(tmp_path / "a.img")
    theirs = nib.load(tmp_path / "a.hdr")
    for ending in ("hdr", "img"):
        path = tmp_path / f"a.{ending}"
        content = path.read_bytes()
        path.unlink()
        path = tmp_path / (f"a.{ending.upper() if upper else ending}" + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
    for ending in ("hdr", "img"):
        path = tmp_path / (f"a.{ending.upper() if upper else ending}" + ".gz" * packed)
        volume = read_file(path)
        assert np.array_equal(volume.read(), make_array())
        assert np.allclose(volume.affine, theirs.affine)
        assert {file.name.lower()[:5] for file in list_parts(path)} == {"a.hdr", "a.img"}
        assert bool(volume.notes) == (kind is nib.AnalyzeImage)
    for file, word in zip(list_parts(path)[::-1], ("header without", "no such"), strict=True):
        file.unlink()
        with pytest.raises(InputError, match=f"{word}|voxels without header"):
            read_file(tmp_path / path.name.replace("img", "hdr").replace("IMG", "HDR"))


def test_the_matrix_file_beside_an_analyze_pair_is_read_and_listed(tmp_path: Path) -> None:
    nib.Spm99AnalyzeImage(make_array(), AFFINE).to_filename(tmp_path / "a.img")
    volume = read_file(tmp_path / "a.img")
    assert np.allclose(volume.affine, AFFINE)
    assert {file.name for file in list_parts(tmp_path / "a.hdr")} == {
        "a.hdr",
        "a.img",
        "a.mat",
    }


def test_axes_of_length_one_behind_the_third_are_left_out(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(make_array()[..., None, None], AFFINE), tmp_path / "a.nii")
    assert np.array_equal(read_file(tmp_path / "a.nii").read(), make_array())
    nib.save(nib.Nifti1Image(np.stack([make_array()] * 2, -1), AFFINE), tmp_path / "b.nii")
    with pytest.raises(InputError, match=r"one 3D volume, got shape \(8, 7, 6, 2\)"):
        read_file(tmp_path / "b.nii")


def test_gzip_of_several_members_and_with_zeros_behind(tmp_path: Path) -> None:
    content = write_nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    blocks = [content[start : start + 100] for start in range(0, len(content), 100)]
    several = b"".join(map(gzip.compress, blocks)) + gzip.compress(b"")
    for whole in (
        several,
        gzip.compress(content) + b"\0" * 512,
        gzip.compress(content + b"\0" * 9),
    ):
        path.write_bytes(whole)
        assert np.array_equal(read_file(path).read(), make_array())
    for odd in (gzip.compress(content) + b"garbage", gzip.compress(content + b"garbage")):
        path.write_bytes(odd)
        with pytest.raises(InputError, match="damaged"):
            read_file(path).read()


def test_voxels_behind_those_that_the_header_announces_are_an_error(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[46:48] = (5).to_bytes(2, "little")  # dim[3] was 6
    path.write_bytes(content)
    with pytest.raises(InputError, match="goes on behind"):
        read_file(path).read()


def test_a_huge_header_allocates_nothing(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz")
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="more than"):
        read_file(path)


def test_voxels_that_do_not_fit_into_the_memory_are_told() -> None:
    for shape in ((2**40, 2**10, 2**10), (2**20, 2**20, 2**20)):
        with pytest.raises(InputError, match=r"a\.nii: its voxels .* do not fit into the memory"):
            allocate(shape, np.float64, "a.nii")


def test_a_file_that_goes_or_changes_before_its_voxels_are_read(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz")
    volume = read_file(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="was changed"):
        volume.read()
    path.unlink()
    for read in (volume.read, lambda: next(volume.slabs([(0, 1)]))):
        with pytest.raises(InputError, match="no such file"):
            read()


@pytest.mark.parametrize("name", ["a", "a.png", "a.nii.bz2", "a.mgz", "a.nii.zip"])
def test_other_endings_are_refused_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="the ending must be one of"):
        read_file(tmp_path / name)


def test_gzip_against_the_name_is_told(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii").rename(tmp_path / "b.nii.gz")
    with pytest.raises(InputError, match=r"rename it b\.nii"):
        read_file(tmp_path / "b.nii.gz")
    write_nifti(tmp_path / "a.nii.gz").rename(tmp_path / "c.nii")
    with pytest.raises(InputError, match=r"rename it c\.nii\.gz"):
        read_file(tmp_path / "c.nii")


# ---------------------------------------------------------------------------------------
# MetaImage and NRRD, against SimpleITK
# ---------------------------------------------------------------------------------------

TYPES = [
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
]


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray, compress: bool) -> Path:
    """By SimpleITK: `array` (X, Y, Z) on `affine` (LPS mm)."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array.T)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=compress)
    return path


def read_by_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and affine (RAS mm) as SimpleITK reads them."""
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    columns = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine = np.diag([-1, -1, 1, 1]) @ nib.affines.from_matvec(columns, image.GetOrigin())
    return SimpleITK.GetArrayFromImage(image).T, affine


def assert_same_as_itk(path: Path) -> None:
    volume, (array, affine) = read_file(path), read_by_itk(path)
    assert np.array_equal(volume.read(), array)
    assert volume.read().dtype == array.dtype
    assert np.allclose(volume.affine, affine, rtol=0, atol=1e-6)
    assert volume.notes == ()
    assert volume.oriented


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("compress", [False, True])
def test_itk_files_are_read_as_itk_reads_them(tmp_path: Path, ending: str, compress: bool) -> None:
    for seed, dtype in enumerate(TYPES):
        path = write_itk(
            tmp_path / f"{dtype}{ending}", make_array(dtype), random_affine(seed), compress
        )
        assert_same_as_itk(path)
        assert len(list_parts(path)) == (2 if ending in (".mhd", ".nhdr") else 1)
    for number, (order, signs) in enumerate(AXES[::3]):
        affine = random_affine(1, shuffle=False)
        affine[:3, :3] = affine[:3, :3] @ np.eye(3)[list(order)] * signs
        assert_same_as_itk(
            write_itk(tmp_path / f"{number}{ending}", make_array(), affine, compress)
        )


BIG = make_array(">i2")


@pytest.mark.parametrize(
    "lines",
    [
        "", "TransformMatrix = -\nRotation = 0 1 0 1 0 0 0 0 -1", "Offset = -\nPosition = 4 5 6",
        "TransformMatrix = -\nOrientation = 0 1 0 0 0 1 1 0 0", "Offset = -\nOrigin = 4 5 6",
        "BinaryDataByteOrderMSB = -\nElementByteOrderMSB = True", "ElementNumberOfChannels = 1",
        "Comment = of a scanner", "AnatomicalOrientation = RAI\nCenterOfRotation = 0 0 0",
        "ElementSpacing = -\nElementSize = 1 2 3",
    ],
)  # fmt: skip
def test_other_spellings_of_metaimage(tmp_path: Path, lines: str) -> None:
    assert_same_as_itk(write_meta(tmp_path / "a.mha", BIG, lines))


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("skip", [0, 7, -1])
def test_metaimage_with_its_voxels_beside_it(tmp_path: Path, size: bool, skip: int) -> None:
    raw, packed = BIG.tobytes("F"), zlib.compress(BIG.tobytes("F"))
    lead = b"\1" * (7 if skip else 0)
    (tmp_path / "a.raw").write_bytes(lead + raw)
    lines = f"HeaderSize = {skip}\nElementDataFile = a.raw"
    assert_same_as_itk(write_meta(tmp_path / "a.mhd", BIG, lines, b""))
    (tmp_path / "a.zraw").write_bytes(packed)
    lines = "CompressedData = True\nElementDataFile = a.zraw"
    lines += f"\nCompressedDataSize = {len(packed)}" * size
    path = write_meta(tmp_path / "b.mhd", BIG, lines, b"")
    assert np.array_equal(read_file(path).read(), make_array())


@pytest.mark.parametrize(
    "lines",
    [
        "", "space: right-anterior-superior", "space: RAS", "space: left-anterior-superior",
        "space: LPS", "encoding: gzip", "encoding: gz", "byte skip: 5", "line skip: 2",
        "byte skip: -1", "type: int16", "space units: \"mm\" \"mm\" \"mm\"",
    ],
)  # fmt: skip
def test_spellings_of_nrrd(tmp_path: Path, lines: str) -> None:
    body = BIG.tobytes("F")
    lead = {"byte skip: 5": b"\1" * 5, "line skip: 2": b"\1\n\n", "byte skip: -1": b"\1" * 3}
    body = lead.get(lines, b"") + (gzip.compress(body) if "gz" in lines else body)
    assert_same_as_itk(write_nrrd(tmp_path / "a.nrrd", BIG, lines, body))
    (tmp_path / "a.raw").write_bytes(body)
    lines = f"{lines}\ndata file: a.raw".strip()
    path = write_nrrd(tmp_path / "b.nhdr", BIG, lines, b"")
    assert_same_as_itk(path)
    assert list_parts(path) == [path, tmp_path / "a.raw"]


def test_nrrd_with_a_fourth_axis_of_one_and_without_directions(tmp_path: Path) -> None:
    lines = (
        "dimension: 4\nsizes: 8 7 6 1\nkinds: domain domain domain list\n"
        "space directions: (1.5,0,0) (0,1.5,0) (0,0,2.5) none"
    )
    volume = read_file(write_nrrd(tmp_path / "a.nrrd", BIG, lines))
    assert np.array_equal(volume.read(), make_array())
    assert volume.spacing_mm == (1.5, 1.5, 2.5)
    lines = "space: -\nspace directions: -\nspace origin: -\nspacings: 1.5 1.5 2.5"
    volume = read_file(write_nrrd(tmp_path / "b.nrrd", BIG, lines))
    assert np.allclose(np.abs(volume.affine), np.diag([1.5, 1.5, 2.5, 1]))
    assert not volume.oriented
    assert len(volume.notes) == 3
    volume = read_file(write_nrrd(tmp_path / "c.nrrd", BIG, 'space units: "cm" "cm" "cm"'))
    assert volume.spacing_mm == (15, 15, 25)


BAD_META = [
    "NDims = 1e30", "NDims = 2", "NDims = -3", "NDims = 3 3", "NDims = -", "DimSize = 8 7",
    "DimSize = 8 7 0", "DimSize = 8 7 -6", "DimSize = 8 7 6.0", "DimSize = 8 7 999999999999",
    "DimSize = 99999999999999999999 1 1", "ElementType = MET_SHOT", "ElementType = -",
    "ElementType = MET_SHORT_ARRAY", "ElementNumberOfChannels = 3", "BinaryData = False",
    "CompressedData = perhaps", "ElementSpacing = 1 1", "ElementSpacing = 1 1 nan",
    "ElementSpacing = 1 1 0", "ElementSpacing = 1 1 x", "Offset = 1 2 inf", "Offset = 1 2",
    "Offset = 1e30 0 0", "TransformMatrix = 1 0 0 0 1 0 0 0 0", "TransformMatrix = 1 0 0",
    "HeaderSize = -2", "ElementToIntensityFunctionSlope = 2", "CompressedData = True",
    "CompressedData = True\nCompressedDataSize = 0", "DimSize = 8 7 7", "DimSize = 8 7 5",
    "ElementDataFile = LIST", "ElementDataFile = a%03d.raw 1 6 1", "ElementDataFile = /etc/passwd",
    "ElementDataFile = ../secret.raw", "ElementDataFile = x/../../secret.raw",
    "ElementDataFile = C:\\secret.raw", "ElementDataFile = gone.raw", "ElementDataFile = ..\\a",
    "ElementDataFile = .", "ElementSpacing = 100 1 1", "ElementSpacing = 1.5 1.5 \x1f.5",
    "Offset = \r1 2 \x0b3",
]  # fmt: skip
BAD_NRRD = [
    "dimension: 1e30", "dimension: 2", "dimension: -", "dimension: 4", "sizes: 8 7", "sizes: 8 7 0",
    "sizes: 8 7 -6", "sizes: 8 7 7", "sizes: 8 7 5", "sizes: 9999999999 99999999 9",
    "sizes: 99999999999999999999 1 1", "type: block", "type: shot", "type: -", "endian: -",
    "endian: middle", "encoding: bzip2", "encoding: hex", "encoding: text", "encoding: gzip",
    "space: scanner-xyz", "space: left", "space directions: (1.5,0,0) (0,1.5,0)",
    "space directions: (1.5,0,0) (0,1.5,0) (0,0,nan)", "space directions: (1,0,0) (1,0,0) (0,0,1)",
    "space directions: (1.5,0,0) (0,1.5,0) (0,0)", "space directions: none none none",
    "space directions: (1.5,0,0) (0,1.5,0) (0,0,2.5) x", "space origin: (1,2)",
    "space origin: 1e30", "byte skip: -2", "line skip: -1", "line skip: 99999", "byte skip: 9999",
    "data file: LIST", "data file: a%03d.raw 1 6 1", "data file: /etc/passwd",
    "data file: ../secret.raw", "data file: gone.raw",
    "space directions: (\r1.5,0,0) (0,1.5,0) (0,0,2.5)", "space origin: (\x0c1,2,3)",
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "ending", "lines"),
    [(write_meta, ".mha", line) for line in BAD_META]
    + [(write_nrrd, ".nrrd", line) for line in BAD_NRRD],
)
def test_headers_of_nonsense_are_refused(tmp_path: Path, write, ending: str, lines: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(BIG.tobytes("F"))
    path = write(folder / f"a{ending}", BIG, lines)
    with pytest.raises(InputError) as caught:
        read_file(path).read()
    assert str(path) in str(caught.value)


def test_geometry_that_a_metaimage_does_not_give_is_told(tmp_path: Path) -> None:
    for key in ("TransformMatrix", "Offset", "ElementSpacing"):
        volume = read_file(write_meta(tmp_path / "a.mha", BIG, f"{key} = -"))
        assert len(volume.notes) == 1
        assert volume.oriented == (key != "TransformMatrix")


# ---------------------------------------------------------------------------------------
# Damage, whatever the format
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    assert sweep_cuts(tmp_path, name, number=40)["refused"] >= 40


@pytest.mark.parametrize("name", PACKED_FILES)
def test_a_flipped_byte_in_a_compressed_file_never_changes_a_voxel(
    tmp_path: Path, name: str
) -> None:
    counts = sweep_flips(tmp_path, name, number=80)
    assert counts["refused"] > 0.85 * 80


@pytest.mark.parametrize("name", ["packed.mha", "packed.nrrd", "a.nii.gz"])
def test_a_zeroed_end_is_refused(tmp_path: Path, name: str) -> None:
    path = write_any(tmp_path, name)
    content = path.read_bytes()
    path.write_bytes(content[:-80] + b"\0" * 80)
    with pytest.raises(InputError, match="damaged"):
        read_file(path).read()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_give_a_volume_or_one_error(tmp_path_factory, data) -> None:
    """Whatever stands in a file, under whatever ending."""
    ending = data.draw(st.sampled_from(VOLUME_SUFFIXES))
    content = data.draw(st.binary(max_size=700))
    lead = data.draw(
        st.sampled_from([b"", b"NRRD0004\n", b"NDims = 3\n", b"\x1f\x8b\x08", b"\x5c\x01\0\0"])
    )
    path = tmp_path_factory.mktemp("any") / f"a{ending}"
    path.write_bytes(lead + content)
    try:
        read_file(path).read()
    except InputError as error:
        assert str(path.parent) in str(error)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 10**6),
    ending=st.sampled_from([".nii", ".nii.gz"]),
)
def test_any_shape_and_type_is_written_and_read(
    tmp_path_factory, shape, dtype, seed, ending
) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{ending}"
    volume = Volume(make_array(dtype, shape), random_affine(seed))
    volume.write_checked(path)
    written = read_file(path)
    assert np.array_equal(written.read(), volume.data)
    assert np.allclose(written.affine, volume.affine, atol=1e-4)
    assert np.array_equal(written.ras.data, volume.ras.data)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    write=st.sampled_from([write_meta, write_nrrd]),
    number=st.integers(0, 9),
    value=st.one_of(
        st.text(st.characters(codec="latin-1", exclude_characters="\n\r"), max_size=20),
        st.lists(st.floats(), max_size=9).map(lambda numbers: " ".join(map(str, numbers))),
        st.lists(st.integers(), max_size=4).map(lambda numbers: " ".join(map(str, numbers))),
    ),
)
def test_any_value_in_a_text_header_gives_a_volume_or_one_error(
    tmp_path_factory, write, number: int, value: str
) -> None:
    path = tmp_path_factory.mktemp("any") / ("a.mha" if write is write_meta else "a.nrrd")
    lines = write(path, BIG).read_bytes().split(b"\n")
    mark = b" = " if write is write_meta else b": "
    line = lines[1 + number]
    if mark in line:
        lines[1 + number] = line.partition(mark)[0] + mark + value.encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    try:
        volume = read_file(path)
        assert volume.read().shape == volume.shape
    except InputError as error:
        assert str(path) in str(error)
