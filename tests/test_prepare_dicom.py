"""DICOM through prepare.py: geometry counts, faults are refused with the reason, no names leak."""

import json
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SHARED_DATA
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from helpers import ras_arrays, run

from utilities import InputError, read_label, read_volume, voxels

SECRETS = {"PatientName": "Doe^Jane", "PatientID": "ID-4711", "StudyDate": "19991231"}
SPACING = (5.0, 5.0, 5.0)


def write_series(
    folder: Path, scan: np.ndarray, tilt=0.0, intercept=-1024, name="{:03d}", **changes
) -> list[pydicom.Dataset]:
    """A CT series of a RAS array (X, Y, Z), file names in random order, a wrong SliceThickness."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.rint(scan[::-1, ::-1] - intercept).astype(np.uint16)  # LPS
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    order = np.random.default_rng(0).permutation(scan.shape[2])
    slices = []
    for z in range(scan.shape[2]):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
        header.SeriesInstanceUID, header.StudyInstanceUID = series, study
        header.FrameOfReferenceUID, header.Modality, header.InstanceNumber = frame, "CT", int(z)
        for key, value in SECRETS.items():
            setattr(header, key, value)
        header.PatientBirthDate, header.PatientSex, header.StudyTime = "19700101", "F", "120000"
        header.AccessionNumber, header.StudyID, header.Manufacturer = "1", "1", "none"
        header.Rows, header.Columns = stored.shape[1], stored.shape[0]
        header.SliceThickness = 1.25
        header.PixelSpacing = [SPACING[1], SPACING[0]]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [-100.0, -90.0 + tilt * z, 30.0 + SPACING[2] * z]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation = 0
        header.RescaleSlope, header.RescaleIntercept = 1, intercept
        header.PixelData = np.ascontiguousarray(stored[:, :, z].T).tobytes()
        for key, value in changes.items():
            setattr(header, key, value(z) if callable(value) else value)
        header.save_as(folder / name.format(order[z]), enforce_file_format=True)
        slices.append(header)
    return slices


def write_seg(path: Path, slices: list[pydicom.Dataset], label: np.ndarray) -> None:
    """A DICOM SEG of the liver (1) and tumour (2) of a RAS label map."""
    from pydicom.sr.codedict import codes

    def segment(number: int, name: str) -> highdicom.seg.SegmentDescription:
        return highdicom.seg.SegmentDescription(
            number, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL"
        )

    highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=label[::-1, ::-1].transpose(2, 1, 0).astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment(1, "Liver"), segment(2, "Tumour")],
        series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(),
        instance_number=1, manufacturer="none", manufacturer_model_name="none",
        software_versions="1", device_serial_number="1",
    ).save_as(path)  # fmt: skip


def test_a_series_is_ordered_by_position_and_rescaled_to_hu(tmp_path):
    scan, _ = ras_arrays(0)
    write_series(tmp_path / "ct", scan)
    image = read_volume(tmp_path / "ct")
    assert np.array_equal(voxels(image), scan[::-1, ::-1])
    assert voxels(image).dtype == np.int16
    assert np.allclose(
        image.affine, np.diag([-5, -5, 5, 1]) + [[0, 0, 0, v] for v in (100, 90, 30, 0)]
    )
    one = read_volume(next((tmp_path / "ct").iterdir()))  # one file stands for its series
    assert np.array_equal(voxels(one), voxels(image))


def test_series_with_seg_and_nifti_labels_are_prepared_and_nothing_private_is_written(tmp_path):
    raw = tmp_path / "raw"
    for index in range(3):
        scan, label = ras_arrays(index)
        secret = {"PatientID": "ID-4711" if index < 2 else "ID-4712"}
        slices = write_series(raw / f"pat{index}" / "scan", scan, name="IMG{:03d}", **secret)
        if index == 1:
            affine = read_volume(raw / f"pat{index}" / "scan").affine
            nib.save(nib.Nifti1Image(label[::-1, ::-1], affine), raw / "pat1/scan/liver.nii.gz")
        else:
            write_seg(raw / f"pat{index}" / "seg.dcm", slices, label)
    dataset = run(raw, training=0.5, validation=0.5, test=0)
    assert len(dataset["cases"]) == 3
    for case in dataset["cases"]:
        index = int(Path(case["image"]).parent.name[3:])
        scan, label = ras_arrays(index)
        assert case["voxels_per_label"]["1"] == np.count_nonzero(label == 1)
        assert case["covered_foreground_voxels"] == np.count_nonzero(label)
        for entry in (e for e in dataset["subvolumes"] if e["case"] == case["case"]):
            window = slice(entry["first_slice"], entry["first_slice"] + 16)
            for key, array in (("image", scan), ("label", label)):
                piece = nib.load(tmp_path / "prepared" / entry[key])
                assert np.array_equal(np.asanyarray(piece.dataobj), array[:, :, window])
    assert len({case["patient"] for case in dataset["cases"]}) == 2  # one PatientID twice
    for path in (tmp_path / "prepared").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (*SECRETS.values(), "ID-4712", "19700101"):
            assert secret not in path.name and secret.encode() not in content


FAULTS = {
    "uneven gaps": (
        "uneven gaps of 5.00 to 10.00 mm",
        {"ImagePositionPatient": lambda z: [0, 0, 5 * z + 5 * (z > 7)]},
    ),
    "gantry tilt": ("gantry tilt of 16.7°", {"tilt": 1.5}),
    "several acquisitions": (
        "share a position: several acquisitions",
        {"ImagePositionPatient": lambda z: [0, 0, 5 * (z // 2)]},
    ),
    "two stacks": (
        "must be one stack of parallel slices",
        {"ImageOrientationPatient": lambda z: [1, 0, 0, 0, 1, 0] if z % 2 else [1, 0, 0, 0, 0, -1]},
    ),
    "two series": (
        "must hold one DICOM series",
        {"SeriesInstanceUID": lambda z: "1.2.3" if z % 2 else "1.2.4"},
    ),
    "pixels cut off": ("cannot be decoded", {"PixelData": b"\0" * 100}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_series_that_is_no_regular_grid_is_refused_with_the_reason(fault, tmp_path):
    message, changes = FAULTS[fault]
    write_series(tmp_path / "ct", ras_arrays(0)[0][:, :, :16], **changes)
    with pytest.raises(InputError, match=message) as error:
        voxels(read_volume(tmp_path / "ct"))
    assert str(tmp_path / "ct") in str(error.value)


def test_a_stray_image_and_a_copy_are_left_out_and_told(tmp_path):
    scan = ras_arrays(0)[0][:, :, :16]
    slices = write_series(tmp_path / "ct", scan)
    slices[3].save_as(tmp_path / "ct" / "copy", enforce_file_format=True)
    stray = slices[5]
    stray.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    stray.SOPInstanceUID = stray.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    stray.save_as(tmp_path / "ct" / "stray", enforce_file_format=True)
    image = read_volume(tmp_path / "ct")
    assert np.array_equal(voxels(image), scan[::-1, ::-1])
    assert [note.split()[0] for note in image.extra["notes"]] == ["1", "1"]


def test_a_seg_of_another_scan_is_refused(tmp_path):
    scan, label = ras_arrays(0)
    write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", scan), label)
    other = nib.Nifti1Image(scan, np.diag([-4.0, -4, 4, 1]))
    with pytest.raises(InputError, match="not a DICOM SEG on the grid of its scan"):
        read_label(tmp_path / "seg.dcm", other)


# ---------------------------------------------------------------------------------------
# Real series
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_dicom() -> Path:
    folder = SHARED_DATA / "dicom"
    if not folder.is_dir():
        pytest.skip("the real DICOM series are not here (dicom beside the project)")
    return folder


def test_the_real_series_equals_its_nifti(tmp_path, real_dicom, real_ct):
    dataset = run(real_dicom, destination=tmp_path / "out", training=1, validation=0, test=0)
    (case,) = dataset["cases"]
    assert (case["slices"], case["spacing_mm"][2]) == (44, 5.0)
    assert "1 images of another orientation" in " ".join(case["warnings"])
    nifti = nib.as_closest_canonical(nib.load(real_ct / "imagesTr/tace_0697.nii.gz"))
    expected = np.asanyarray(nifti.dataobj)
    for entry in dataset["subvolumes"]:
        first = entry["first_slice"]
        piece = nib.load(tmp_path / "out" / entry["image"])
        assert np.array_equal(np.asanyarray(piece.dataobj), expected[:, :, first : first + 16])
        window = nifti.slicer[:, :, first : first + 16]
        assert np.abs(piece.affine - window.affine).max() < 1e-3  # mm
    text = json.dumps(dataset)
    assert "0697" not in text.replace(str(real_dicom), "")


def test_gantry_tilt_is_refused_and_jpeg_2000_is_read(real_dicom):
    with pytest.raises(InputError, match=r"uneven gaps of 1.08 to 7.00 mm.*gantry tilt of 18.5°"):
        read_volume(real_dicom / "gantry_tilt_28")
    image = read_volume(real_dicom / "jpeg2000_20")
    assert image.shape == (512, 512, 20)
    assert (voxels(image).min(), voxels(image).dtype) == (-1024, np.int16)
