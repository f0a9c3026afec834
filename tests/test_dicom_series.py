"""DICOM series: geometry counts, faults are refused with the reason, nothing is left out unsaid."""

import copy
import re
import subprocess

import highdicom
import numpy as np
import pydicom
import pytest
from conftest import SHARED_DATA, random_affine
from helpers import SECRETS, call_script, ras_arrays, save, write_phantom_seg, write_phantom_series
from pydicom.uid import generate_uid

from benchmarks.sweeps import sweep_seg, sweep_series
from data.dicom import find_dicom, list_series_files, read_series, write_series
from data.files import InputError
from data.labels import USUAL_LABELS
from data.seg import read_seg
from data.volumes import Volume, read_file

DEPTH = 8


def small(depth: int = DEPTH) -> np.ndarray:
    return ras_arrays(0)[0][:, :, :depth]


def test_a_series_is_ordered_by_position_and_rescaled_to_hu(tmp_path):
    scan = small(20)
    write_phantom_series(tmp_path / "ct", scan)
    image = read_series(tmp_path / "ct")
    assert np.array_equal(image.read(), scan[::-1, ::-1])
    assert image.read().dtype == np.int16
    affine = [[-5, 0, 0, 100], [0, -5, 0, 90], [0, 0, 5, 30], [0, 0, 0, 1]]
    assert np.allclose(image.affine, affine)
    one = read_series(next((tmp_path / "ct").iterdir()))  # one file stands for its series
    assert np.array_equal(one.read(), image.read())
    assert sorted(one.files) == list_series_files(tmp_path / "ct")


PLACE, PLANE = "ImagePositionPatient", "ImageOrientationPatient"
AXIAL, ACROSS = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]
FAULTS = {  # what changes → what the message says
    "gaps of 5.00 to 10.00 mm": {"ImagePositionPatient": lambda z: [0, 0, 5 * z + 5 * (z > 3)]},
    "gantry tilt of 16.7°": {"tilt": 1.5},
    "9.00 mm beside the stack": {"ImagePositionPatient": lambda z: [9 * (z == 4), 0, 5 * z]},
    "share a position: several acquisitions": {"ImagePositionPatient": lambda z: [0, 0, z // 2]},
    "must be one stack of parallel slices": {PLANE: lambda z: AXIAL if z % 2 else ACROSS},
    "must be or hold one DICOM series": {"SeriesInstanceUID": lambda z: f"1.2.{z % 2}"},
    "cannot be decoded": {"PixelData": b"\0" * 100},
    "PixelData must be 4608 bytes": {"PixelData": b"\0" * 5000},
    "RescaleSlope and RescaleIntercept must be numbers as in the other": {
        "RescaleIntercept": lambda z: None if z == 3 else -1024
    },
    "perpendicular vectors": {"ImageOrientationPatient": [1, 0, 0, 0.1, 1, 0]},
    "PixelSpacing must be positive": {"PixelSpacing": [0, 5]},
    "RescaleSlope must be another number than 0": {"RescaleSlope": 0},
    "PhotometricInterpretation must be": {"PhotometricInterpretation": "RGB"},
    "NumberOfFrames must be 0, as PerFrame": {"NumberOfFrames": 24},
    "ModalityLUTSequence": {"ModalityLUTSequence": [pydicom.Dataset()]},
    r"got several \(PatientID of 00.; 00.\)": {"PatientID": lambda z: f"P{z > 4}"},
    "every second slice is another": {"RescaleIntercept": lambda z: -1024 + 400 * (z % 2)},
    "PixelSpacing .* must be those of the": {"PixelSpacing": lambda z: [4 + (z != 3)] * 2},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_series_that_is_no_regular_grid_is_refused_with_the_reason(fault, tmp_path):
    write_phantom_series(tmp_path / "ct", small(), **FAULTS[fault])
    with pytest.raises(InputError, match=fault) as error:
        read_series(tmp_path / "ct").read()
    assert str(tmp_path / "ct") in str(error.value)


def test_a_copy_a_stray_image_and_localisers_are_left_out_and_reported(tmp_path):
    slices = write_phantom_series(tmp_path, small())
    slices[3].save_as(tmp_path / "copy", enforce_file_format=True)
    planes = {"stray": ACROSS, "front": [0, 1, 0, 0, 0, -1], "side": ACROSS}
    for z, (name, plane) in enumerate(planes.items()):
        slices[z].ImageOrientationPatient = plane
        if z:
            slices[z].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            slices[z].SeriesInstanceUID = "1.2.3"
        slices[z].save_as(tmp_path / name, enforce_file_format=True)
    image = read_series(tmp_path)
    assert np.array_equal(image.read(), small()[::-1, ::-1])
    told = ("1 copies of", "1 images of", "front: one image, or a localiser, is no scan")
    assert all(words in "; ".join(image.notes) for words in told) and len(image.notes) == 3
    assert [bool(item.fault) for item in find_dicom(tmp_path.iterdir())] == [False, True]


PARTS = {  # tag, by slice: slices 0, 2, 4 … of one scan, 1, 3, 5 … of another
    "AcquisitionNumber": lambda z: 1 + z % 2,
    "AcquisitionTime": lambda z: f"12000{z % 2}",
    "ConvolutionKernel": lambda z: ["B30f", "B70f"][z % 2],
    "ImageType": lambda z: ["ORIGINAL", "PRIMARY", ["AXIAL", "CSA"][z % 2]],
    "KVP": lambda z: [80, 140][z % 2],
    "PatientID": lambda z: "AB"[z % 2],
    "SeriesDescription": lambda z: ["arterial", "venous"][z % 2],
    "TriggerTime": lambda z: 100 * (z % 2),
}


@pytest.mark.parametrize("tag", PARTS)
def test_interleaved_scans_are_never_mixed_and_each_can_be_chosen(tag, tmp_path):
    write_phantom_series(tmp_path / "ct", small(), **{tag: PARTS[tag]})
    with pytest.raises(InputError, match=rf"got several \({tag} of .*; .*\); name a file"):
        read_series(tmp_path / "ct")
    for file in (tmp_path / "ct").iterdir():
        z = int(pydicom.dcmread(file).InstanceNumber)
        image = read_series(file)
        assert np.array_equal(image.read(), small()[::-1, ::-1, z % 2 :: 2])
        assert image.spacing_mm == (5, 5, 10) and tag in image.notes[0]


ODD = {
    "one acquisition continues the other": {"AcquisitionNumber": lambda z: 1 + z // 4},
    "a time for each slice": {"AcquisitionTime": lambda z: f"1200{z:02d}"},
    "one odd slice": {"ConvolutionKernel": lambda z: "B70f" if z == 3 else "B30f"},
    "MR interleaved in time": {"Modality": "MR", "AcquisitionTime": lambda z: f"12000{z % 2}"},
    "equal storage UIDs": {"SOPInstanceUID": "1.2.3"},
    "cosines beside a rounding": {PLANE: lambda z: [1, 0.00049 + 2e-5 * (z % 2), 0, 0, 1, 0]},
    "spacing in six and seven digits": {"PixelSpacing": lambda z: [0.7421875 + 5e-7 * (z % 2)] * 2},
    "positions rounded to 0.1 mm": {PLACE: lambda z: [0.3, 0, round(30 + 0.625 * z, 1)]},
    "empty rescale": {"RescaleSlope": None, "RescaleIntercept": None, "signed": True},
    "no SOP class, no modality": {"SOPClassUID": None, "Modality": None},
    "no series UID": {"SeriesInstanceUID": None},
    "inverted on screens": {"PhotometricInterpretation": "MONOCHROME1"},
    "cosines of three digits": {PLANE: [1, 0, 0, 0, 0.906, -0.423]}
    | {PLACE: lambda z: [0, 2.115 * z, 4.53 * z]},
}
BARE = ("no syntax", "no preamble")
STORED = ("JPEGLSLossless", "12 bits signed", "overlay bits", "a slope for each slice", *BARE)


def encode(header: pydicom.Dataset, z: int, kind: str) -> None:
    stored = np.frombuffer(header.PixelData, np.uint16).reshape(48, 48)
    if kind == "12 bits signed":
        header.BitsStored, header.HighBit, header.PixelRepresentation = 12, 11, 1
        header.RescaleIntercept = 0
        header.PixelData = ((stored.astype(np.int16) - 1024) & 0x0FFF).astype("<u2").tobytes()
    elif kind == "overlay bits":
        header.BitsStored, header.HighBit = 12, 11
        header.PixelData = (stored | 0xF000).astype("<u2").tobytes()
    elif kind == "a slope for each slice":
        header.RescaleSlope, factor = (0.5, 2) if z % 2 else (1, 1)
        header.PixelData = (stored * factor).astype("<u2").tobytes()
    elif kind in BARE:
        del header.file_meta.TransferSyntaxUID
    else:
        header.compress(getattr(pydicom.uid, kind))


@pytest.mark.parametrize("kind", [*ODD, *STORED])
def test_sound_series_that_look_odd_are_read_whole(kind, tmp_path):
    scan, changes = np.clip(small(), -1024, 1000), ODD.get(kind, {})
    intercept = 0 if "signed" in changes else -1024
    slices = write_phantom_series(tmp_path, scan, "{}", intercept=intercept, **changes)
    how = {"implicit_vr": False, "little_endian": True} if kind in BARE else {}
    for z, header in enumerate(slices if kind in STORED else ()):
        encode(header, z, kind)
        header.preamble = None if kind == "no preamble" else bytes(128)
        header.save_as(tmp_path / f"{z}", enforce_file_format=not how, **how)
    image = read_series(tmp_path)
    assert np.array_equal(image.read(), scan[::-1, ::-1])
    assert not any("left out" in note for note in image.notes)


@pytest.mark.parametrize("signed", [False, True])
def test_padding_brighter_than_tissue_becomes_air_and_is_reported(signed, tmp_path):
    """−2000 declared in the other sign: 62,512 HU as it stands, in 6 × 6 voxels of 8 slices."""
    for z, header in enumerate(write_phantom_series(tmp_path, small(), "{}")):
        stored = np.frombuffer(header.PixelData, np.uint16).reshape(48, 48).copy()
        stored[:6, :6] = 63536
        header.PixelData = stored.tobytes()
        if signed:
            header.add_new("PixelPaddingValue", "SS", -2000)
        else:
            header.PixelPaddingValue, header.PixelPaddingRangeLimit = 63530, 63540
        header.save_as(tmp_path / f"{z}", enforce_file_format=True)
    image, expected = read_series(tmp_path), small()[::-1, ::-1].copy()
    expected[:6, :6] = -1024
    assert np.array_equal(image.read(), expected)
    assert image.notes == ("288 voxels of padding (PixelPaddingValue) are now air",)


def test_an_enhanced_multi_frame_file_is_a_series(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    slices = write_phantom_series(tmp_path / "old", small(), FrameOfReferenceUID="1.2.3")
    file = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        [slices[z] for z in np.random.default_rng(1).permutation(DEPTH)],
        generate_uid(), 1, generate_uid(), 1,
    )  # fmt: skip
    file.save_as(folder / "one.dcm", enforce_file_format=True)
    image = read_series(folder)
    assert np.array_equal(image.read(), small()[::-1, ::-1]) and image.spacing_mm == (5, 5, 5)
    assert [(item.images, item.fault) for item in find_dicom(folder.iterdir())] == [(1, "")]
    del file.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    file.save_as(folder / "one.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=r"one\.dcm: ImagePositionPatient must be 3 numbers"):
        read_series(folder)


def test_other_objects_are_no_scans_and_say_what_they_are(tmp_path):
    scan, label = small(), ras_arrays(0)[1][:, :, :DEPTH]
    folder = tmp_path / "ct"
    slices = write_phantom_series(folder, scan)
    seg = write_phantom_seg(folder / "seg.dcm", slices, label)
    other = copy.deepcopy(slices[0])
    del other.ImagePositionPatient, other.ImageOrientationPatient
    for name, sop in {"dose": "481.2", "screen": "7", "rt": "481.3"}.items():
        other.SOPInstanceUID = generate_uid()
        if name == "rt":  # the others say that they are of the series
            other.SeriesInstanceUID = generate_uid()
        other.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{sop}"
        other.file_meta.MediaStorageSOPClassUID = other.SOPClassUID
        other.Modality = {"dose": "RTDOSE", "rt": "RTSTRUCT"}.get(name, "OT")
        other.save_as(folder / name, enforce_file_format=True)
    told = {"seg.dcm": "got SEG .*seg.dcm", "rt": "RTSTRUCT .*convert its contours"}
    for name, reason in (told | {"dose": "got no"}).items():
        with pytest.raises(InputError, match=reason):
            read_series(folder / name)
        assert list_series_files(folder / name) == [folder / name]
    image = read_series(folder)
    assert image.shape[2] == DEPTH and image.notes == ()
    assert {file.name for file in list_series_files(folder)} == {f"{z:03d}" for z in range(DEPTH)}
    (tmp_path / "alone").mkdir()
    seg.rename(tmp_path / "alone" / "seg.dcm")
    with pytest.raises(InputError, match=r"must be or hold one DICOM series .* got SEG"):
        read_series(tmp_path / "alone")


def test_a_series_is_its_files_wherever_they_lie(tmp_path):
    for z, header in enumerate(write_phantom_series(tmp_path / "one", small())):
        for form in (f"halves/{z // 4}", f"each/{z}"):
            (tmp_path / form).mkdir(parents=True, exist_ok=True)
            header.save_as(tmp_path / form / f"{z}.dcm", enforce_file_format=True)
    for name in ("halves", "each"):
        (item,) = find_dicom((tmp_path / name).rglob("*"))
        assert (item.path, item.images, item.fault) == (tmp_path / name, DEPTH, "")
        assert np.array_equal(read_series(item.path).read(), small()[::-1, ::-1])
        assert set(list_series_files(item.path)) == set(item.files)
    write_phantom_series(tmp_path / "halves" / "2", small())
    halves, other = find_dicom((tmp_path / "halves").rglob("*"))
    assert re.search("lies in .*halves/0, .*halves/1, beside others", halves.fault)
    assert other.path == tmp_path / "halves" / "2" and not other.fault
    for name in ("0", "1"):  # two series in both halves
        (tmp_path / f"halves/{name}/0").write_bytes((tmp_path / "halves/2/000").read_bytes())
    with pytest.raises(InputError, match=r"halves/0: its series goes on in .*halves/1"):
        read_series(tmp_path / "halves/0/0.dcm")


def test_a_broken_file_stops_only_the_series_that_it_may_belong_to(tmp_path):
    first = write_phantom_series(tmp_path, small(), name="a{}")
    write_phantom_series(tmp_path, small(), name="b{}")
    del first[3].Rows, first[3].Columns, first[3].PixelData
    first[3].save_as(tmp_path / "z", enforce_file_format=True)
    assert read_series(tmp_path / "b0").shape[2] == DEPTH
    with pytest.raises(InputError, match="/z: its DICOM header ends before Rows"):
        read_series(tmp_path / "a0")
    del first[3].SeriesInstanceUID
    first[3].save_as(tmp_path / "z", enforce_file_format=True)
    with pytest.raises(InputError, match="/z: its DICOM header ends before Rows"):
        read_series(tmp_path / "b0")


@pytest.mark.filterwarnings("ignore")
def test_a_cut_or_lost_last_slice_never_shortens_a_scan(tmp_path):
    """Without its last slice a series is still regular; a readme beside it takes nothing away."""
    write_phantom_series(tmp_path, small(4), name="x{:02d}.dcm")
    last = tmp_path / "x03.dcm"
    whole = last.read_bytes()
    (tmp_path / "readme.txt").touch()
    (tmp_path / "._x03.dcm").touch()  # macOS
    assert read_series(tmp_path).shape[2] == 4
    uid = whole.index(b"UI", whole.index(b"\x20\x00\x0e\x00"))  # of the series
    for end in [*range(0, len(whole), 97), 129, *range(uid, uid + 60, 8)]:
        last.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"x03\.dcm"):
            read_series(tmp_path)
    last.write_bytes(bytes(len(whole)))  # of a copy without its blocks
    with pytest.raises(InputError, match=r"x03\.dcm: empty or unreadable"):
        read_series(tmp_path / "x00.dcm")
    last.unlink()
    last.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"x03\.dcm: empty or unreadable"):
        read_series(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sweep", "number"), [(sweep_series, 60), (sweep_seg, 40)])
def test_a_tag_of_nonsense_gives_the_right_result_or_one_input_error(sweep, number, tmp_path):
    counts = sweep(tmp_path, number=number)
    assert counts["right"] > 5 and counts["refused"] > 5, counts


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_scan_becomes_a_series_and_comes_back(dtype, tmp_path):
    save(small(10)[:30, :40].astype(dtype), random_affine(4), tmp_path / "Doe^Jane.nii.gz")
    volume = read_file(tmp_path / "Doe^Jane.nii.gz")
    files = write_series(volume, tmp_path / "ct")
    image = read_series(tmp_path / "ct")
    assert np.array_equal(image.ras.data, volume.ras.data) and image.read().dtype == np.int16
    assert np.abs(image.ras_affine - volume.ras_affine).max() < 1e-3
    assert list(image.files) == files and image.notes == ()
    again = write_series(volume, tmp_path / "again")
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]
    other = write_series(volume.like(volume.read() + 1), tmp_path / "other")
    assert len({pydicom.dcmread(f[0]).SeriesInstanceUID for f in (files, other)}) == 2
    assert pydicom.dcmread(files[0]).PatientID == "anonymous"
    for file in files:
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values())
    assert not list(tmp_path.glob(".*"))


REFUSED = {
    "fractions": (lambda: small(4) + np.float32(0.5), np.eye(4), "whole HU"),
    "too bright": (lambda: small(4).astype(np.int32) + 70000, np.eye(4), "whole HU from -32768"),
    "sheared": (lambda: small(4), random_affine(1, shear=0.1), "perpendicular axes"),
    "one slice": (lambda: small(1), np.eye(4), "needs 2 slices or more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_series_cannot_hold_is_refused_and_a_folder_in_use_left_alone(kind, tmp_path):
    make, affine, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        write_series(Volume(make(), affine, "scan.nii.gz"), tmp_path / "ct")
    assert not list(tmp_path.iterdir())
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="must be a new folder"):
        write_series(Volume(small(4), np.eye(4)), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_the_commands_convert_both_ways(tmp_path):
    scan, label = (array[:, :, 12:28] for array in ras_arrays(0))
    for name, array in (("scan", scan), ("label", label)):
        save(array, random_affine(5), tmp_path / f"{name}.nii.gz")

    def convert(words: str) -> subprocess.CompletedProcess[str]:
        command, *names = words.split()
        return call_script("-m", "data.seg", command, *(tmp_path / name for name in names))

    for words in ("to-series scan.nii.gz ct", "to-nifti ct again.nii.gz",
                  "to-seg label.nii.gz ct seg.dcm"):  # fmt: skip
        done = convert(words)
        assert done.returncode == 0 and "next: " in done.stdout, done.stderr
    again, volume = read_file(tmp_path / "again.nii.gz"), read_file(tmp_path / "scan.nii.gz")
    assert np.array_equal(again.ras.data, volume.ras.data)
    seg = read_seg(tmp_path / "seg.dcm", read_series(tmp_path / "ct"), USUAL_LABELS)
    assert np.array_equal(seg.ras.data, read_file(tmp_path / "label.nii.gz").ras.data)
    faults = {"to-nifti ct x.txt": "must end in", "to-seg scan.nii.gz ct x.dcm": "holds"}
    for words, message in faults.items():
        done = convert(words)
        assert done.returncode == 1 and re.search(f"^error: .*{message}", done.stderr, re.M)
    assert not list(tmp_path.glob("x.*"))


def test_gantry_tilt_is_refused_and_jpeg_2000_is_read():
    folder = SHARED_DATA / "dicom"
    if not folder.is_dir():
        pytest.skip("the real DICOM series are not here (dicom beside the project)")
    with pytest.raises(InputError, match=r"gaps of 1.08 to 7.00 mm.*gantry tilt of 18.5°"):
        read_series(folder / "gantry_tilt_28")
    image = read_series(folder / "jpeg2000_20")
    assert image.shape == (512, 512, 20) and image.notes == ()
    assert (image.read().min(), image.read().dtype) == (-1024, np.int16)
