"""Volumes: voxels keep their position, and a file is read right or refused with one message."""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ct_image, random_affine

import data.volumes
from benchmarks import sweeps
from benchmarks.sweeps import AFFINE, make_array, same_place, write_meta, write_nifti, write_nrrd
from data.files import InputError
from data.volumes import Volume, keep_volumes, list_parts, name_case, read_file

SECRET = "DOE^JANE"
BIG = make_array(">i2")


@pytest.mark.parametrize("shear", [0.0, 0.2])
def test_voxels_of_all_48_orientations_keep_their_position_through_ras_and_back(shear):
    for order, *signs in itertools.product(itertools.permutations(range(3)), *[(1, -1)] * 3):
        affine = random_affine(1, shear=shear, shuffle=False)
        affine[:3, :3] = affine[:3, :3] @ np.eye(3)[list(order)] * signs
        volume = Volume(make_array(), affine)
        ras = volume.ras
        assert ras.axcodes == "RAS"
        assert ras.shape == volume.ras_shape
        position = nib.affines.apply_affine(affine, (1, 5, 2))
        there = np.rint(nib.affines.apply_affine(np.linalg.inv(ras.affine), position)).astype(int)
        assert ras.data[tuple(there)] == volume.data[1, 5, 2]
        back = volume.from_ras(ras.data)
        assert np.array_equal(back.data, volume.data)
        assert same_place(back, volume)


def test_a_box_keeps_its_position() -> None:
    part = Volume(make_array(), AFFINE).crop((slice(2, 7), slice(None), slice(1, None, 2)))
    assert np.array_equal(part.data, make_array()[2:7, :, 1::2])
    assert np.allclose(part.affine @ [0, 0, 1, 1], AFFINE @ [2, 0, 3, 1])
    assert Volume(make_array()[..., None, None], AFFINE).shape == (8, 7, 6)


@pytest.mark.parametrize(
    ("array", "affine", "word"),
    [
        (np.zeros((3, 0, 3)), np.eye(4), "3D"),
        (np.zeros((3, 3, 3, 2)), np.eye(4), "3D"),
        (np.zeros((3, 3, 3), complex), np.eye(4), "numbers"),
        (np.zeros((3, 3, 3)), np.eye(3), "affine"),
        (np.zeros((3, 3, 3)), np.diag([1, 1, 0, 1]), "affine"),
        (np.zeros((3, 3, 3)), np.full((4, 4), np.nan), "affine"),
        (np.zeros((3, 3, 3)), np.diag([1, 1, 51, 1]), "spacing"),
        (np.zeros((3, 3, 3)), np.diag([0.01, 1, 1, 1]), "spacing"),
        (np.zeros((3, 3, 3)), nib.affines.from_matvec(np.eye(3), [1e30, 0, 0]), "origin"),
        (np.full((3, 3, 3), np.nan), np.eye(4), "27 voxels are NaN or infinite"),
    ],
)
def test_what_is_no_volume_is_refused(array: np.ndarray, affine: np.ndarray, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        Volume(array, affine)
    assert (caught.value.kind == "nan") == ("NaN" in word)


@pytest.mark.parametrize("codes", [(1, 2), (0, 2), (1, 0), (0, 0)])
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
    volume.like(make_array(np.uint8)).write(tmp_path / "out.nii.gz", check=True)
    header = nib.load(tmp_path / "out.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == codes
    assert np.allclose(read_file(tmp_path / "out.nii.gz").affine, volume.affine, atol=1e-4)
    assert header.get_xyzt_units()[0] == unit


def test_the_checksum_is_that_of_the_file_and_readers_see_its_slope(tmp_path: Path) -> None:
    path, volume = tmp_path / "a.nii.gz", Volume(make_array(np.uint8), AFFINE)
    assert volume.write(path, slope=1 / 255) == zlib.crc32(path.read_bytes())
    volume.write(path, slope=1 / 255, check=True)
    assert np.allclose(read_file(path).read(), make_array() / 255, atol=1e-6)


@pytest.mark.parametrize("position", [-3, 280 + 3, 112], ids=["voxel", "affine", "slope"])
def test_a_file_that_changes_in_writing_is_not_kept(tmp_path, monkeypatch, position: int) -> None:
    sound = write_nifti(tmp_path / "sound.nii")

    def damage(path: Path) -> io.BytesIO:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        return io.BytesIO(content)

    monkeypatch.setattr(data.volumes, "open_stream", damage)
    with pytest.raises(InputError, match="changed in writing"):
        Volume(make_array(), AFFINE).write(tmp_path / "out.nii", check=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="changed in writing"):  # its header lies elsewhere
        replace(read_file(sound), affine=AFFINE + np.eye(4, k=3) * 0.01).write(sound, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["sound.nii"]


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
    volume.like(make_array(np.uint8)).write(tmp_path / "a.nii", check=True)
    volume.ras.write(tmp_path / "b.nii")
    volume.crop((slice(2), slice(2), slice(2))).write(tmp_path / "c.nii")
    nib.save(volume.to_nibabel(), tmp_path / "d.nii")
    for name in "abcd":
        assert SECRET.encode() not in (tmp_path / f"{name}.nii").read_bytes()


def test_a_header_field_of_nonsense_gives_the_right_volume_or_one_error(tmp_path) -> None:
    counts = sweeps.sweep_nifti_header(tmp_path, number=100)
    assert counts["refused"] > 6
    assert counts["right"] > 6


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("endian", "<>")
def test_every_kind_of_nifti_and_byte_order_is_read(tmp_path: Path, kind, endian: str) -> None:
    path = tmp_path / ("a.hdr" if "Pair" in kind.__name__ else "a.nii")
    for codes in ((1, 2), (1, 0), (0, 2)):
        volume = read_file(write_nifti(path, kind, codes, endian))
        assert np.array_equal(volume.read(), make_array())
        assert np.allclose(volume.affine, AFFINE, atol=1e-4)


def test_forms_that_disagree_are_noted_and_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    image = ct_image(make_array(), AFFINE)
    image.set_qform(AFFINE + np.eye(4, k=3) * 3, 1)
    nib.save(image, tmp_path / "b.nii")
    volume = read_file(tmp_path / "b.nii")
    assert np.allclose(volume.affine, AFFINE, atol=1e-4)
    assert "sform and qform disagree" in volume.notes[0]
    image.header["xyzt_units"] = 5
    nib.save(image, tmp_path / "c.nii")
    with pytest.raises(InputError, match="unit"):
        read_file(tmp_path / "c.nii")


def test_slopes_that_are_no_numbers_mean_no_scaling(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    for slope, inter, factor in ((np.nan, 3, 1), (0, 3, 1), (2, 0, 2), (-1, 0, -1)):
        content[112:120] = np.array([slope, inter], "<f4").tobytes()
        path.write_bytes(content)
        assert np.array_equal(read_file(path).read(), make_array() * factor)
    content[112:120] = np.array([1, np.nan], "<f4").tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match="intercept"):
        read_file(path)


def test_a_qfac_of_0_means_1_and_any_other_number_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", codes=(1, 0))
    content, sound = path.read_bytes(), read_file(path)
    path.write_bytes(content[:76] + np.array([0], "<f4").tobytes() + content[80:])
    assert same_place(read_file(path), sound)
    path.write_bytes(content[:76] + np.array([1.25], "<f4").tobytes() + content[80:])
    with pytest.raises(InputError, match="qfac"):
        read_file(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.AnalyzeImage])
@pytest.mark.parametrize("ends", ["hdr img", "hdr.gz img.gz", "HDR IMG"])
def test_a_pair_is_read_by_either_name(tmp_path: Path, kind, ends: str) -> None:
    head, voxels = (tmp_path / f"a.{end}" for end in ends.split())
    kind(make_array(), np.diag([-2.0, 2, 2, 1])).to_filename(voxels)
    for path in (head, voxels):
        volume = read_file(path)
        assert np.array_equal(volume.read(), make_array())
        assert np.allclose(volume.affine, nib.load(head).affine)
        assert list_parts(path) == [head, voxels]
        assert bool(volume.notes) == (kind is nib.AnalyzeImage)
        assert volume.oriented == (not volume.notes)
    assert keep_volumes([head, voxels]) == [head]
    voxels.unlink()
    with pytest.raises(InputError, match=f"no such file, {voxels.name}"):
        read_file(head)


def test_the_matrix_file_beside_an_analyze_pair_is_read_and_listed(tmp_path: Path) -> None:
    nib.Spm99AnalyzeImage(make_array(), AFFINE).to_filename(tmp_path / "a.img")
    assert np.allclose(read_file(tmp_path / "a.img").affine, AFFINE)
    assert [file.suffix for file in list_parts(tmp_path / "a.hdr")] == [".hdr", ".img", ".mat"]


@pytest.mark.parametrize("sizes", [[8, 7, 5], [32767] * 3], ids=["fewer", "more"])
def test_a_header_that_announces_another_number_of_voxels_is_refused(tmp_path, sizes) -> None:
    path = write_nifti(tmp_path / "a.nii.gz")
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array(sizes, "<i2").tobytes()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"goes on behind|Memory|missing"):
        read_file(path)


def test_a_name_says_what_a_file_is_whatever_its_capitals(tmp_path: Path) -> None:
    plain, packed = write_nifti(tmp_path / "A.NII"), write_nifti(tmp_path / "B.NII.GZ")
    assert all(np.array_equal(read_file(f).read(), make_array()) for f in (plain, packed))
    assert [name_case(path) for path in (plain, packed)] == ["A", "B"]
    for wrong, remedy in (("b.nii.gz", "rename it b.nii"), ("b.mgz", "convert it first")):
        plain = plain.rename(tmp_path / wrong)
        with pytest.raises(InputError, match=remedy):
            read_file(plain)


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("compress", [False, True])
def test_an_itk_file_has_the_position_that_nibabel_gives_it(tmp_path, ending, compress) -> None:
    import SimpleITK

    for seed, dtype in enumerate(("u1", "i2", "u2", "i4", "f4", "f8")):
        nifti, path = tmp_path / "a.nii", tmp_path / f"{seed}{ending}"
        affine = random_affine(seed)
        nib.save(nib.Nifti1Image(make_array(dtype), affine, dtype=dtype), nifti)
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(nifti)), str(path), useCompression=compress)
        volume = read_file(path)
        assert np.array_equal(volume.read(), make_array(dtype))
        assert volume.dtype == dtype
        assert np.allclose(volume.affine, affine, atol=1e-4)
        assert (volume.notes, volume.oriented) == ((), True)
        assert len(list_parts(path)) == (2 if ending in (".mhd", ".nhdr") else 1)


def test_voxels_beside_a_header_and_behind_other_bytes(tmp_path: Path) -> None:
    for skip, lead in ((0, b""), (7, b"\1" * 7), (-1, b"\1" * 3)):
        (tmp_path / "a.raw").write_bytes(lead + BIG.tobytes("F"))
        lines = f"HeaderSize = {skip}\nElementDataFile = a.raw"
        meta = write_meta(tmp_path / "a.mhd", BIG, lines, b"")
        nrrd = write_nrrd(tmp_path / "a.nhdr", BIG, f"byte skip: {skip}\ndata file: a.raw", b"")
        for path in (meta, nrrd):
            assert np.array_equal(read_file(path).read(), make_array())
            assert list_parts(path) == [path, tmp_path / "a.raw"]


def test_geometry_that_a_header_does_not_give_is_noted(tmp_path: Path) -> None:
    for key in ("TransformMatrix", "Offset", "ElementSpacing"):
        volume = read_file(write_meta(tmp_path / "a.mha", BIG, f"{key} = -"))
        assert key in volume.notes[0]
        assert volume.oriented == (key != "TransformMatrix")
    lines = "Offset = -\nPosition = 4 5 6\nTransformMatrix = -\nRotation = 1 0 0 0 1 0 0 0 1"
    assert read_file(write_meta(tmp_path / "a.mha", BIG, lines)).notes == ()
    lines = "space: -\nspace directions: -\nspace origin: -\nspacings: 1.5 1.5 2.5"
    volume = read_file(write_nrrd(tmp_path / "b.nrrd", BIG, lines))
    assert np.allclose(np.abs(volume.affine), np.diag([1.5, 1.5, 2.5, 1]))
    assert (volume.oriented, len(volume.notes)) == (False, 1)


BAD_META = [
    "NDims = 1e30", "NDims = 2", "DimSize = 8 7 5", "DimSize = 8 7 999999999999",
    "ElementNumberOfChannels = 3", "CompressedData = True", "ElementSpacing = 1 1 nan",
    "TransformMatrix = 1 0 0 0 1 0 0 0 0", "ElementDataFile = a%03d.raw 1 6 1",
    "ElementDataFile = /etc/passwd", "ElementDataFile = ../secret.raw",
    "ElementDataFile = gone.raw", "BinaryData = False", "ElementToIntensityFunctionSlope = 2",
]  # fmt: skip
BAD_NRRD = [
    "dimension: 4", "sizes: 8 7 5", "sizes: 9999999999 9 9", "type: block", "encoding: gzip",
    "space: scanner-xyz", "space directions: none none none", "space origin: (1,2)",
    'space units: "cm" "cm" "cm"', "byte skip: 9999", "data file: ../secret.raw",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_META + BAD_NRRD)
def test_headers_of_nonsense_are_refused(tmp_path: Path, line: str) -> None:
    (folder := tmp_path / "folder").mkdir()
    (tmp_path / "secret.raw").write_bytes(BIG.tobytes("F"))
    write, name = (write_meta, "a.mha") if line in BAD_META else (write_nrrd, "a.nrrd")
    path = write(folder / name, BIG, line)
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", sweeps.WHOLE_FILES)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    assert sweeps.sweep_cuts(tmp_path, name, number=40)["refused"] >= 40


@pytest.mark.parametrize("name", sweeps.PACKED_FILES)
def test_a_flipped_bit_or_odd_bytes_in_a_compressed_file_never_change_a_voxel(tmp_path, name):
    assert sweeps.sweep_flips(tmp_path, name, number=80)["refused"] > 0.85 * 80
    path = sweeps.write_any(tmp_path, name)
    content = path.read_bytes()
    for odd in (content[:-80] + b"\0" * 80, content + b"garbage"):
        path.write_bytes(odd)
        with pytest.raises(InputError, match="damaged"):
            read_file(path)
