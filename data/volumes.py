"""Volumes: voxels and their position in the patient, read from and written to volume files.

nibabel reads NIfTI and Analyze, SimpleITK reads MetaImage and NRRD. Checks around both refuse files
that are cut off, damaged or contradict themselves. `data.dicom` reads DICOM.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage

from data.files import InputError, atomic_write, one_error

ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz", *ITK_SUFFIXES)
AIR_HU = -1024  # what lies outside a scan
BODY_HU = -500  # between lung and fat
LEAST_MM, MOST_MM = 0.05, 50.0  # spacing of a scan of a person; outside, the unit is wrong
FARTHEST_MM = 1e5  # of the first voxel from the origin; beyond, float32 is too coarse
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS mm ↔ LPS mm, as ITK and DICOM have them
SLAB = 16  # slices that are resampled at a time: they stay in the processor's cache
CHUNK = 2**20
GEOMETRY = ("qform", "quatern", "qoffset", "sform", "srow", "xyzt")  # names of fields begin so
UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7: unknown, metre, mm, micron
NUMBERS = r"(none +)*\(?([-+\d.eE]+[(), ]+){2,}[-+\d.eE]+\)?( +none)*"  # three or more
ITK_VALUES = {  # key → form of its value; on others SimpleITK guesses, crashes or reads on
    "NDims": "[3-7]", "DimSize": r"([1-9]\d{0,5}( +|$)){3,}", "HeaderSize": r"-1|\d+",
    "ElementSpacing": NUMBERS, "Offset": NUMBERS, "TransformMatrix": NUMBERS,
    "CompressedData": "(?i)true|false|raw|gz|gzip", "space units": '("mm"|"millimeter"| )+',
    "space": "(?i)(left-posterior|right-anterior|left-anterior)-superior|lps|ras|las",
    "ElementToIntensityFunctionSlope": r"1(\.0*)?", "ElementToIntensityFunctionOffset": r"0(\.0*)?",
}  # fmt: skip
ITK_NAMES = {  # other names for the same, NRRD's too
    "dimension": "NDims", "sizes": "DimSize", "byte skip": "HeaderSize", "line skip": "HeaderSize",
    "spacings": "ElementSpacing", "ElementSize": "ElementSpacing", "encoding": "CompressedData",
    "Position": "Offset", "Origin": "Offset", "space origin": "Offset",
    "Rotation": "TransformMatrix", "Orientation": "TransformMatrix", "datafile": "ElementDataFile",
    "space directions": "TransformMatrix", "data file": "ElementDataFile",
}  # fmt: skip
Box = tuple[slice, ...]  # part of a volume: first voxel and the one behind the last, by axis


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D array of finite numbers and its position in the patient; InputError for another one."""

    data: Any  # array (X, Y, Z)
    affine: np.ndarray  # 4×4, voxel index → patient millimetres, RAS+
    name: str = "volume"  # for messages: the path it was read from
    header: Any = None  # NIfTI header of the file whose grid this is; None: our own grid
    oriented: bool = True  # False where the file has no orientation (form codes 0)
    notes: tuple[str, ...] = ()  # what reading left out, corrected or doubts
    files: tuple[Path, ...] = ()  # of a DICOM series, in the order of its slices
    classes: dict[str, int] = field(default_factory=dict)  # of a label map: name → value in it
    convert: Callable[[np.ndarray], np.ndarray] | None = None  # of each array that is read

    def __post_init__(self) -> None:
        if set(self.shape[3:]) == {1}:  # one volume
            object.__setattr__(self, "data", self.data.reshape(self.shape[:3], order="F"))
        if not self.dtype.isnative:
            object.__setattr__(self, "data", self.data.astype(self.dtype.newbyteorder("=")))
        affine, fault, odd = np.asarray(self.affine, float), "", 0
        sound = affine.shape == (4, 4) and np.isfinite(affine).all()
        sound = sound and np.allclose(affine[3], [0, 0, 0, 1])
        spacing = nib.affines.voxel_sizes(affine) if sound else np.zeros(3)
        if len(self.shape) != 3 or 0 in self.shape:
            fault = f"must be one 3D volume, got shape {self.shape}; split or convert it first"
        elif self.dtype.kind not in "iuf":
            fault = f"voxels must be numbers, got type {self.dtype}; convert it first"
        elif not spacing.all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
            fault = f"its affine {affine.tolist()} defines no voxel positions; export it again"
        elif not LEAST_MM <= spacing.min() <= spacing.max() <= MOST_MM:
            fault = f"spacing must be {LEAST_MM} to {MOST_MM} mm, got {spacing}; correct its unit"
        elif np.abs(affine[:3, 3]).max() > FARTHEST_MM:
            fault = f"its origin must be within {FARTHEST_MM:g} mm, got {affine[:3, 3]}; correct it"
        elif self.dtype.kind == "f" and (odd := sum(np.sum(~np.isfinite(p)) for p in self.data.T)):
            fault = f"{odd} voxels are NaN or infinite, expected numbers; convert it again"
        if fault:
            raise InputError(f"{self.name}: {fault}", kind="nan" if odd else "unreadable")

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis, as stored."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored voxels."""
        return self.data.dtype

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of each voxel axis in mm, in the order of the array's axes."""
        x, y, z = (float(length) for length in nib.affines.voxel_sizes(self.affine))
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel: |determinant of the affine|, which holds for sheared grids too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @cached_property
    def orientation(self) -> np.ndarray:
        """(3, 2): which patient axis each array axis follows, and its direction, as in nibabel."""
        return io_orientation(self.affine)

    @property
    def axcodes(self) -> str:
        """Where the array's axes run: "RAS", "LPS", …"""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """Shape that the volume has once its axes run R, A, S."""
        x, y, z = (self.shape[axis] for axis in np.argsort(self.orientation[:, 0]))
        return x, y, z

    @cached_property
    def ras_affine(self) -> np.ndarray:
        """Affine that the volume has once its axes run R, A, S."""
        return self.affine @ inv_ornt_aff(self.orientation, self.shape)

    def read(self) -> np.ndarray:
        """Return all voxels (X, Y, Z) in the stored axes, converted."""
        return self.convert(self.data) if self.convert else self.data

    @cached_property
    def ras(self) -> Volume:
        """The volume, converted, with axes nearest to R, A, S; every voxel keeps its position."""
        array = apply_orientation(self.read(), self.orientation)  # a view
        return replace(self, data=array, affine=self.ras_affine, header=None, convert=None)

    def like(self, array: np.ndarray) -> Volume:
        """Return `array`, in the stored axes, on exactly this grid: shape, affine, form codes."""
        if array.shape != self.shape:
            raise ValueError(f"array must have the grid's shape {self.shape}, got {array.shape}")
        return replace(self, data=array, notes=(), files=(), classes={}, convert=None)

    def from_ras(self, array: np.ndarray) -> Volume:
        """Return `array`, whose axes run R, A, S, on exactly this grid, in its own axes."""
        turn = ornt_transform(io_orientation(np.eye(4)), self.orientation)
        return self.like(np.asfortranarray(apply_orientation(array, turn)))

    def crop(self, box: Sequence[slice]) -> Volume:
        """Return the part in `box`: a slice with bounds and step, or `slice(None)`, per axis."""
        bounds = [part.indices(size) for part, size in zip(box, self.shape, strict=True)]
        corner, steps = [b[0] for b in bounds], np.diag([b[2] for b in bounds])
        moved = self.affine @ nib.affines.from_matvec(steps, corner)
        return replace(self, data=self.read()[tuple(box)], affine=moved, header=None, convert=None)

    def to_nibabel(self, slope: float = 1.0) -> nib.Nifti1Image:
        """Return a NIfTI-1 image on this grid; readers multiply its stored numbers by `slope`."""
        array = self.read()
        header = nib.Nifti1Image(np.empty(self.shape, np.uint8), self.affine).header
        header.set_xyzt_units("mm")
        if self.header is not None:
            for key in (key for key in header if key.startswith(GEOMETRY)):
                header[key] = self.header[key]  # no other: texts may identify a patient
            header["pixdim"][:4] = self.header["pixdim"][:4]
        image = nib.Nifti1Image(array, header.get_best_affine(), header, dtype=array.dtype)
        image.header["vox_offset"] = header.single_vox_offset
        image.header.set_slope_inter(slope, 0)
        return image

    def write(self, path: Path, slope: float = 1.0, check: bool = False) -> int:
        """Write `.nii` or `.nii.gz` whole or not at all; return the file's CRC-32. With `check` the
        file is kept only if it has this grid and holds these voxels."""
        image = self.to_nibabel(slope)
        header, planes = image.header, np.asanyarray(image.dataobj).T
        block = header.binaryblock.ljust(header.single_vox_offset, b"\0")
        with atomic_write(path) as temporary:
            with contextlib.ExitStack() as stack:
                stream: Any = stack.enter_context(temporary.open("wb"))
                if path.suffix == ".gz":  # without name and time
                    stream = stack.enter_context(igzip.IGzipFile("", "wb", 1, stream, mtime=0))
                stream.write(block)
                stream.writelines(plane.tobytes() for plane in planes)
            if check:
                unit = UNIT_MM[int(header["xyzt_units"]) & 7]
                gap = np.diag([unit, unit, unit, 1]) @ image.affine - self.affine
                with open_stream(temporary) as stream:
                    same = np.abs(gap).max() < 1e-4 and stream.read(len(block)) == block
                    same = same and all(stream.read(p.nbytes) == p.tobytes() for p in planes)
                    if not same or stream.read(1):
                        raise InputError(f"{path}: changed in writing; choose another disk")
            return isal_zlib.crc32(temporary.read_bytes())


def name_case(path: Path) -> str:
    """Return `liver_3` for `…/liver_3.nii.gz`; the folder's own name for a DICOM folder."""
    known = [s for s in (*VOLUME_SUFFIXES, ".dcm") if path.name.lower().endswith(s)]
    return path.name[: len(path.name) - len(max(known, key=len, default=""))]


def keep_volumes(files: Sequence[Path]) -> list[Path]:
    """Return the volume files among some, a header and its voxels once."""
    heads = {file: re.sub(r"(?i)\.img(\.gz)?$", ".hdr", str(file)) for file in files}
    there = {str(file).lower().removesuffix(".gz") for file in files}
    volumes = [file for file in files if file.name.lower().endswith(VOLUME_SUFFIXES)]
    return [f for f in volumes if heads[f] == str(f) or heads[f].lower() not in there]


def list_parts(path: Path) -> list[Path]:
    """Return the files that reading a volume file reads: header, voxels, SPM's affine."""
    parts = [path]
    if re.search(r"(?i)\.(hdr|img)(\.gz)?$", path.name):
        files = nib.Spm99AnalyzeImage.filespec_to_file_map(path)
        parts = [Path(str(files[key].filename)) for key in ("header", "image", "mat")]
    elif path.name.lower().endswith(ITK_SUFFIXES) and path.is_file():
        name = read_itk_header(path)[0].get("ElementDataFile", "LOCAL")
        if re.search(r"^LIST|%|:|^[/\\]|\.\.", name):
            what = f"its voxels must be in one file in its folder, got {name!r}; move or join them"
            raise InputError(f"{path}: {what}")
        parts += [path.parent / name] if name.upper() != "LOCAL" else []
    if missing := [part.name for part in parts[:2] if not part.is_file()]:
        raise InputError(f"{path}: no such file, {missing[0]}; header and voxels are needed")
    return [part for part in parts if part.is_file()]


def read_file(path: Path) -> Volume:
    """Read a NIfTI, Analyze, MetaImage or NRRD file. Raises InputError for anything else."""
    name, known = path.name.lower(), ", ".join(VOLUME_SUFFIXES)
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if not name.endswith(VOLUME_SUFFIXES):
        raise InputError(f"{path}: the ending must be one of {known}; unpack or convert it first")
    with one_error(path, "cannot be read"):
        return read_itk(path) if name.endswith(ITK_SUFFIXES) else read_nifti(path)


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file, or a NIfTI or Analyze pair by either name."""
    head, data = (list_parts(path) * 2)[:2]
    with open_stream(head) as stream, nib.imageglobals.LoggingOutputSuppressor():
        image: Any = nib.load(head)
        header = type(image.header).from_fileobj(stream, check=False)  # as it is, not mended
        header["pixdim"][0] = header["pixdim"][0] or 1  # by NIfTI's standard
        header.check_fix(error_level=1)
    proxy, affine, oriented, notes = image.dataobj, image.affine, False, []
    if isinstance(header, nib.Nifti1Header):
        unit = UNIT_MM.get(int(header["xyzt_units"]) & 7)
        if unit is None or (head == data and proxy.offset < header.single_vox_offset):
            raise ValueError(f"its header has unit {unit} and data offset {proxy.offset}")
        affine = np.diag([unit, unit, unit, 1.0]) @ header.get_best_affine()
        oriented = bool(header["qform_code"] or header["sform_code"])
        if header["qform_code"] and header["sform_code"]:
            corners = np.reshape(np.meshgrid(*([0, n - 1] for n in image.shape[:3]), 1), (4, -1))
            gap = np.linalg.norm((header.get_sform() - header.get_qform()) @ corners, axis=0).max()
            if not (apart := gap / header["pixdim"][1:4].min()) <= 0.5:  # voxels
                notes.append(f"sform and qform disagree by {apart:.3g} voxels; the sform is used")
    else:
        header, notes = None, ["an Analyze header has no left and right; the usual is taken"]
    array = read_voxels(data, proxy.shape, proxy.dtype, proxy.offset)
    if (proxy.slope, proxy.inter) != (1, 0):
        array = array.astype(np.float32) * np.float32(proxy.slope)
        array += np.float32(proxy.inter)
    return Volume(array, affine, str(path), header, oriented, tuple(notes))


def open_stream(path: Path) -> Any:
    """Open a file for reading, decompressed where its name ends in .gz."""
    with path.open("rb") as file:
        begin = file.read(6)
    zipped = begin.startswith(b"\x1f\x8b")
    for other, sign in {"zip": b"PK\3\4", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}.items():
        if begin.startswith(sign):
            raise InputError(f"{path}: is a {other} file; unpack it, and compress it with gzip")
    if begin.startswith((b"<", b"versio")):
        raise InputError(f"{path}: is a web page or a Git LFS pointer; download the file itself")
    if zipped != path.name.lower().endswith(".gz"):
        what, name = ("is", f"{path.name}.gz") if zipped else ("is not", path.name[:-3])
        raise InputError(f"{path}: its content {what} gzip, against its name; rename it {name}")
    return igzip.open(path, "rb") if zipped else path.open("rb")  # 3 times as fast as gzip


def read_voxels(file: Path, shape: Sequence[int], dtype: np.dtype, offset: int) -> np.ndarray:
    """Return the voxels that a header announces, once the file is read to its end and checked."""
    count = math.prod(shape) * dtype.itemsize
    with open_stream(file) as stream:
        stream.read(offset)
        content = stream.read(count)
        while rest := stream.read(CHUNK):
            if rest.strip(b"\0"):
                raise ValueError(f"it goes on behind the {count} bytes that its header announces")
    if len(content) != count:
        raise ValueError(f"{count - len(content)} of {count} bytes are missing")
    return np.frombuffer(content, dtype).reshape(shape, order="F")


def read_itk_header(path: Path) -> tuple[dict[str, str], int]:
    """Return key → value of a MetaImage or NRRD header, and its length; InputError if unsound."""
    with path.open("rb") as file:
        raw = file.read(CHUNK)
    end = rb"\n\r?\n" if raw.startswith(b"NRRD") else rb"(?m)^ElementDataFile *=.*(\n|\Z)"
    found = re.search(end, raw)
    text = raw[: found.end() if found else len(raw)].decode("latin-1")
    lines = re.findall(r"(?m)^([A-Za-z ]+?) *(?:=|:(?!=)) *(.*?)[ \t\r]*$", text)
    values = {ITK_NAMES.get(key, key): value for key, value in lines}
    if len(values) < len(lines) or re.search(r"[\0-\x08\v\f\x0e-\x1f\x7f]|\r(?!\n)", text):
        raise InputError(f"{path}: a key stands twice, or control characters; convert it again")
    for key in ITK_VALUES.keys() & values.keys():
        if not re.fullmatch(form := ITK_VALUES[key], value := values[key]):
            raise InputError(f"{path}: {key} is {value!r}, expected {form}; convert it to .nii.gz")
    return values, len(text)


def read_itk(path: Path) -> Volume:
    """Read a MetaImage or NRRD file, its voxels in it or beside it."""
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    (values, length), file = read_itk_header(path), list_parts(path)[-1]
    content = file.read_bytes()[length if file == path else 0 :]
    if values.get("CompressedData", "raw").lower() not in ("raw", "false"):
        inflate = zlib.decompressobj(47)  # zlib or gzip; SimpleITK compares no checksum
        content = inflate.decompress(content)
        if not inflate.eof or inflate.unused_data:
            raise ValueError("its compressed stream is cut off or goes on behind its end")
    count, size = len(content), [int(number) for number in values["DimSize"].split()]
    if len(size) != int(values["NDims"]) or math.prod(size) > count:
        raise ValueError(f"its header announces {size} voxels, {count} bytes follow")
    del content  # SimpleITK needs the memory
    nrrd = path.name.lower().endswith(("nrrd", "nhdr"))
    image = sitk.ReadImage(str(path), imageIO="NrrdImageIO" if nrrd else "MetaImageIO")
    array = sitk.GetArrayViewFromImage(image).T.copy(order="F")
    most = count if values.get("HeaderSize", "0") == "0" else array.nbytes
    if not most <= array.nbytes <= count or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"its header announces {array.nbytes} bytes, {count} follow")
    axes = image.GetDimension()
    turn = np.reshape(image.GetDirection(), (axes, axes))[:3, :3] * image.GetSpacing()[:3]
    affine = TO_LPS @ nib.affines.from_matvec(turn, image.GetOrigin()[:3])
    needed = {"Offset", "TransformMatrix", "space" if nrrd else "ElementSpacing"}
    missing = sorted(needed - values.keys())
    notes = (f"the header gives no {', '.join(missing)}; the usual is taken",) if missing else ()
    oriented = not {"TransformMatrix", "space"} & set(missing)
    return Volume(array, affine, str(path), None, oriented, notes)


def write_masked(scan: Volume, label: Volume, background: int, path: Path) -> None:
    """Write a scan with `background` where the label map on its grid is 0, in a type for both."""
    kind = np.result_type(scan.dtype, np.min_scalar_type(background))
    array = np.where(label.read() == 0, kind.type(background), scan.read())
    scan.like(array).write(path, check=True)


def find_bounding_box(mask: np.ndarray) -> Box:
    """Return the smallest box around what is not 0; of no voxels where nothing is."""
    box = [slice(0, size) for size in mask.shape]
    for axis in reversed(range(mask.ndim)):  # each axis looks at what the ones before left
        others = tuple(other for other in range(mask.ndim) if other != axis)
        used = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box[axis] = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
    return tuple(box)


def enclose(*boxes: Box) -> Box:
    """Return the smallest box around some boxes; those of no voxels are left out."""
    full = [box for box in boxes if all(part.stop > part.start for part in box)] or boxes[:1]
    axes = zip(*full, strict=True)
    return tuple(slice(min(b.start for b in axis), max(b.stop for b in axis)) for axis in axes)


def find_body(scan: Volume) -> Box:
    """Return the in-plane box (RAS voxels) of the patient in a CT, without table and air. It
    encloses the largest thing denser than BODY_HU, looked at every 3 mm; else the whole slice."""
    x, y, z = (max(1, round(mm / s)) for mm, s in zip((3, 3, 5), scan.ras.spacing_mm, strict=True))
    dense = scan.ras.data[::x, ::y, ::z] > BODY_HU
    parts, number = ndimage.label(ndimage.binary_opening(dense, np.ones((3, 3, 1))))  # no table
    sides = scan.ras_shape[:2]
    if not number:
        return tuple(slice(0, side) for side in sides)
    largest = np.bincount(parts.ravel())[1:].argmax() + 1
    box = zip(find_bounding_box(parts == largest), (x, y), sides, strict=False)  # not along z
    return tuple(
        slice(max(part.start - 1, 0) * step, min((part.stop + 1) * step, side))
        for part, step, side in box
    )
