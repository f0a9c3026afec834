"""Make synthetic abdominal CTs, so that the whole pipeline runs with nothing downloaded.

    python data/make_phantoms.py --destination data/raw --cases 20 --seed 0
    python data/make_phantoms.py --livers path/to/masks --destination data/raw_painted

One atlas of the abdomen is written down below in reference millimetres: x to the patient's RIGHT,
y to the front, z to the head, the origin on the body axis at the height of the liver's dome. An
organ is an implicit function, negative inside and roughly a distance in millimetres. A patient is
the atlas with jittered numbers, bent by a few smooth waves and scaled; a scan is that patient
sampled on a voxel grid. So orientation, spacing and obliqueness are only sampling, and cannot
break the anatomy. Arrays are (Z, Y, X) in here: in that order they lie in a NIfTI file.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import nibabel as nib
import numpy as np
import tyro
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

# Run as a script, the folder above is not where Python looks for `data` and `utilities`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.volumes import Volume, read_file


@dataclass
class Config:
    destination: Path = Path("data/raw")  # folder to write, in Decathlon layout
    cases: int | None = None  # number of cases; default 20, with --livers all masks
    first: int = 0  # index of the first case, for batches (--first 20 --cases 20)
    seed: int = 0  # case i depends on (seed, i) alone: same numbers, same bytes
    size: int | None = None  # voxels in-plane; default 128, with --livers the mask's own grid
    slices: tuple[int, int] = (40, 72)  # fewest and most slices (not with --livers)
    tumours: tuple[int, int] = (0, 4)  # fewest and most tumours in a liver
    organ: Literal["liver", "spleen"] = "liver"  # what the label map outlines
    livers: Path | None = None  # folder of liver masks: paint a body around each of them
    compress: bool = True  # .nii.gz; --no-compress writes .nii
    workers: int = 1  # processes; the bytes do not depend on it


# ---------------------------------------------------------------------------------------------
# the atlas: HU and reference millimetres (x right, y front, z head)
# ---------------------------------------------------------------------------------------------

LABELS = {
    "liver": {"0": "background", "1": "liver", "2": "tumour"},
    "spleen": {"0": "background", "1": "spleen"},
}
ORIENTATIONS = ("RAS", "LAS", "LPS", "oblique")  # case i takes number i modulo 4
AIR, GAS, LUNG, TABLE, FAT, WATER, SOFT = -1000, -900, -850, -150, -100, 10, 40
MUSCLE, DISC, SPONGY, BONE = 55, 85, 190, 320

HALF_WIDTH, HALF_DEPTH, CAVITY_Y = 138.0, 92.0, 8.0  # the cavity of the trunk and its centre
CAVITY_MM = 112.0  # its mean radius: turns a relative distance into millimetres
SPINE, VERTEBRA = -62.0, 34.0  # y of the vertebral bodies, from one to the next
LIVER_BOX = np.array([[-82.0, -76.0, -168.0], [132.0, 90.0, -1.0]])  # a typical liver
ALONG = np.inf  # radius of a column along the body axis

ORGANS = {  # ellipsoids that differ from patient to patient: centre, radii
    "right dome": ((67, 4, -92), (80, 92, 92)),
    "left dome": ((-68, 4, -112), (76, 88, 92)),
    "left lobe": ((-6, 44, -54), (76, 42, 42)),
    "hollow": ((-22, -38, -140), (74, 66, 78)),  # where the liver makes room for its neighbours
    "heart": ((-26, 42, 28), (56, 46, 44)),
    "sternum": ((0, 106, 60), (18, 6, 110)),
    "stomach": ((-68, 26, -66), (42, 40, 50)),
    "antrum": ((-28, 46, -112), (44, 20, 20)),
    "spleen": ((-104, -36, -72), (34, 46, 50)),
    "right kidney": ((64, -50, -168), (28, 26, 54)),
    "left kidney": ((-66, -50, -148), (28, 26, 54)),
    "gallbladder": ((44, 52, -132), (14, 15, 30)),
    "pancreas": ((-22, 2, -128), (52, 12, 13)),
    "right hip": ((84, -20, -400), (56, 66, 84)),
    "left hip": ((-84, -20, -400), (56, 66, 84)),
}
HEPATIC_TUBES = [  # from, to, radius at either end
    ((16, 0, -104), (34, 12, -84), 7.5, 6.0),  # portal vein, then its right and left branches
    ((34, 12, -84), (88, 32, -70), 5.5, 2.5),
    ((34, 12, -84), (94, -34, -88), 5.5, 2.5),
    ((34, 12, -84), (-22, 46, -62), 5.0, 2.5),
    ((24, -24, -22), (102, -6, -56), 5.5, 2.5),  # hepatic veins, from the vena cava under the dome
    ((24, -24, -22), (62, 50, -58), 5.5, 2.5),
    ((24, -24, -22), (-18, 44, -42), 5.0, 2.5),
]
VERTEBRAE = [  # columns: centre, radii, how far they reach towards the disc (-1 .. 1), HU
    ((0, SPINE - 30, 0), (44, 5, ALONG), -0.3, BONE),  # transverse processes
    ((0, SPINE - 48, 0), (4.5, 22, ALONG), 0.2, BONE),  # spinous process
    ((0, SPINE - 27, 0), (17, 15, ALONG), 0.6, BONE),  # arch
    ((0, SPINE - 27, 0), (10, 9, ALONG), 1, SOFT),  # canal
    ((0, SPINE, 0), (23, 18, ALONG), 1, DISC),
    ((0, SPINE, 0), (23, 18, ALONG), 0.72, BONE),
    ((0, SPINE, 0), (20, 15, ALONG), 0.3, SPONGY),
]


# ---------------------------------------------------------------------------------------------
# shapes: functions of float32 arrays x, y, z (mm), negative inside
# ---------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    level: Callable[..., np.ndarray]  # (x, y, z) -> about the distance in mm to the surface
    low: np.ndarray = np.full(3, -np.inf)  # the box (mm) outside which the level is positive
    high: np.ndarray = np.full(3, np.inf)

    def grown(self, mm: float) -> "Shape":
        return Shape(lambda *p: self.level(*p) - mm, self.low - mm, self.high + mm)

    def within(self, other: "Shape", mm: float = 0) -> "Shape":
        """The intersection, its crease rounded over `mm`."""
        a, b = self.level, other.level
        return Shape(lambda *p: smooth_max(a(*p), b(*p), mm), self.low, self.high)

    def without(self, other: "Shape", mm: float = 0) -> "Shape":
        return self.within(Shape(lambda *p: -other.level(*p)), mm)

    def joined(self, other: "Shape", mm: float) -> "Shape":
        """The union, its crease filled over `mm`."""
        low, high = np.minimum(self.low, other.low) - mm, np.maximum(self.high, other.high) + mm
        return Shape(lambda *p: -smooth_max(-self.level(*p), -other.level(*p), mm), low, high)


def smooth_max(a: np.ndarray, b: np.ndarray, mm: float) -> np.ndarray:
    return 0.5 * (a + b + np.sqrt((a - b) ** 2 + mm * mm)) if mm else np.maximum(a, b)


def ellipsoid(centre, radii) -> Shape:
    """An ellipsoid; a column where a radius is infinite."""
    centre, radii = np.asarray(centre, float), np.asarray(radii, float)
    # as Python floats, because a float64 scalar would turn float32 arrays into float64
    c, inverse = centre.tolist(), (1 / radii).tolist()  # 0 along a column
    least = float(radii.min())

    def level(*p):
        q = sum(((p[n] - c[n]) * inverse[n]) ** 2 for n in range(3) if inverse[n])
        return (np.sqrt(q) - 1) * least

    return Shape(level, centre - radii, centre + radii)


def tube(start, end, r0: float, r1: float) -> Shape:
    """A straight vessel or muscle whose radius goes from r0 to r1."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    s, axis = start.tolist(), (end - start).tolist()
    a = ((end - start) / ((end - start) @ (end - start))).tolist()

    def level(*p):
        t = np.clip(sum((p[n] - s[n]) * a[n] for n in range(3)), 0, 1)
        return np.sqrt(sum((p[n] - s[n] - axis[n] * t) ** 2 for n in range(3))) - r0 - (r1 - r0) * t

    thick = max(r0, r1)
    return Shape(level, np.minimum(start, end) - thick, np.maximum(start, end) + thick)


@Shape
def cavity(x, y, z) -> np.ndarray:
    """The inside of the trunk, between ellipse and rectangle in cross-section, closed on top."""
    u, v = (x * (1 / HALF_WIDTH)) ** 2, ((y - CAVITY_Y) * (1 / HALF_DEPTH)) ** 2
    radius = np.sqrt(np.sqrt(u * u + v * v + 1.3 * u * v))
    return (radius + (np.maximum(z - 130, 0) * (1 / 150)) ** 2 - 1) * CAVITY_MM


@Shape
def muscles(x, y, z) -> np.ndarray:
    """The cavity and its wall, which is thickest beside the spine."""
    back, flank = np.clip((CAVITY_Y - y) * (1 / HALF_DEPTH), 0, 1.2), (x * (1 / 80)) ** 2
    return cavity.level(x, y, z) - 11 - 22 * back * back / (1 + flank * flank)


@Shape
def table(x, y, z) -> np.ndarray:
    rim = np.abs(np.sqrt(x * x + (y - 250) ** 2) - 425) - 3
    return np.maximum(rim, np.maximum(y + 110, np.abs(x) - 210))


@Shape
def ribs(x, y, z) -> np.ndarray:
    """Rings in the wall that fall towards the front, down to the costal arch."""
    rings = 6 * (0.45 - np.cos((z + 0.5 * y) * (2 * np.pi / 29)))
    rings = np.maximum(rings, np.abs(cavity.level(x, y, z) - 5) - 4)
    return np.maximum(rings, np.maximum(0.75 * y - 112 - z, 26 - np.abs(x)))


def between_discs(reach: float) -> Shape:
    return Shape(lambda x, y, z: 6 * (np.cos(z * (2 * np.pi / VERTEBRA)) - reach))


# ---------------------------------------------------------------------------------------------
# the patient: layers of shapes, back to front
# ---------------------------------------------------------------------------------------------

Layers = list[tuple[str, Shape, float]]  # name, shape, HU


@dataclass
class Patient:
    bend: np.ndarray  # (waves, 7): wave vector (1/mm), phase, displacement (mm) of the whole body
    behind: Layers
    liver: Layers  # the liver, then the veins and tumours in it
    front: Layers
    fat: float  # under the skin, mm


def draw_waves(rng: np.random.Generator, n: int, lengths, mm: float, axes: int) -> np.ndarray:
    """(n, 4 + axes): plane waves of random direction, length (mm), phase and amplitude."""
    vector = rng.normal(size=(n, 3))
    vector *= 2 * np.pi / np.linalg.norm(vector, axis=1, keepdims=True)
    phase, amplitude = rng.uniform(0, 2 * np.pi, (n, 1)), rng.uniform(-mm, mm, (n, axes))
    return np.hstack([vector / rng.uniform(lengths[0], lengths[1], (n, 1)), phase, amplitude])


def draw_hu(rng: np.random.Generator) -> dict[str, float]:
    """Portal venous phase: spleen and kidneys so close to the liver that HU cannot tell them."""
    liver = rng.uniform(84, 120)
    above = {"liver": (0, 0), "spleen": (-8, 12), "kidney": (-5, 35), "pancreas": (-25, -5)}
    above |= {"vein": (30, 50), "aorta": (40, 70), "heart": (20, 45)}
    hu = {name: float(liver + rng.uniform(*span)) for name, span in above.items()}
    return hu | {"stomach": float(rng.uniform(5, 100)), "wall": float(rng.uniform(45, 90))}


def draw_liver(rng: np.random.Generator, part: dict[str, Shape], dome: Shape) -> Shape:
    """Two lobes inside ribs and dome, hollow towards kidney, stomach and spine."""
    waves = draw_waves(rng, 4, (60, 130), 2.5, 1).tolist()

    def right(x, y, z):  # follows the dome, and tapers below towards the flank
        level = part["right dome"].level(x + 0.35 * np.minimum(z + 92, 0), y, z) + 4
        for kx, ky, kz, phase, mm in waves:
            level += mm * np.cos(kx * x + ky * y + kz * z + phase)
        return level

    both = Shape(right, *(LIVER_BOX + [[-25], [25]])).joined(part["left lobe"], 24)
    both = both.within(cavity.grown(-5), 8).within(dome.grown(-2), 2)
    spine = ellipsoid((0, SPINE + 8, 0), (40, 38, ALONG))
    return both.without(part["hollow"], 16).without(spine, 10)


def draw_chest(rng: np.random.Generator, part: dict[str, Shape], hu: dict, dome: Shape) -> Layers:
    """Lungs down to the diaphragm, between them heart and mediastinum."""
    lung = cavity.grown(-2).without(dome).within(Shape(lambda x, y, z: -118 - z))
    lung = lung._replace(low=np.array([-np.inf, -np.inf, -120]))
    lobes = [(side, rng.uniform((60, -70, -70), (120, 70, 70))) for side in (1, -1) * 8]
    vessels = [(tube((side * 25, -10, 50), end * (side, 1, 1), 5, 1), SOFT) for side, end in lobes]
    middle = [
        (ellipsoid((0, -8, 0), (30, 74, ALONG)), -20),
        (ellipsoid((-2, -30, 160), (9, 9, 100)), GAS),  # trachea
        (part["heart"].grown(3), FAT),
        (part["heart"], hu["heart"]),
    ]
    inside = [("chest", shape.within(lung), value) for shape, value in vessels + middle]
    return [("lung", lung, LUNG), *inside, ("sternum", part["sternum"], SPONGY)]


def draw_belly(rng: np.random.Generator, part: dict[str, Shape], hu: dict) -> Layers:
    """Psoas muscles, hip bones, bowel with gas, stool or fluid in its loops, pancreas, spine."""
    layers: Layers = []
    for side, name in ((1, "right hip"), (-1, "left hip")):
        psoas = tube((side * 32, -58, -160), (side * 62, -14, -390), 13, 26)
        wing = part[name].without(part[name].grown(-7)).within(Shape(lambda x, y, z: y))
        layers += [("psoas", psoas, MUSCLE), ("hip", wing, BONE)]
    for _ in range(72):
        loop = ellipsoid(rng.uniform((-112, -30, -430), (112, 80, -75)), rng.uniform(13, 32, 3))
        content = float(rng.choice([GAS, -60, WATER, SOFT, *[hu["liver"]] * 4]))
        layers += [("bowel", loop, hu["wall"]), ("bowel", loop.grown(-3), content)]
    layers.append(("pancreas", part["pancreas"], hu["pancreas"]))
    for centre, radii, reach, value in VERTEBRAE:
        layers.append(("spine", ellipsoid(centre, radii).within(between_discs(reach)), value))
    return layers


def draw_front(part: dict[str, Shape], hu: dict, dome: Shape) -> Layers:
    """Spleen, stomach, kidneys, gallbladder, aorta and vena cava."""
    spleen = part["spleen"].within(cavity.grown(-5), 6).within(dome.grown(-3), 6)
    stomach = part["stomach"].joined(part["antrum"], 16).within(dome.grown(-5), 6)
    surface = float(part["stomach"].high[1] - 24)
    gas = stomach.grown(-5).within(Shape(lambda x, y, z: surface - y))  # rises to the front
    layers = [("spleen", spleen, hu["spleen"]), ("stomach", stomach.grown(3), FAT)]
    layers += [("stomach", stomach, MUSCLE), ("stomach", stomach.grown(-5), hu["stomach"])]
    layers.append(("stomach", gas, GAS))
    for name, medial in (("right kidney", -0.6), ("left kidney", 0.6)):
        radii = (part[name].high - part[name].low) / 2
        pelvis = ellipsoid(part[name].low + radii * (1 + medial, 1, 1), radii * (0.6, 0.35, 0.45))
        layers += [("kidney", part[name].grown(2), FAT), ("kidney", part[name], hu["kidney"])]
        layers.append(("kidney", pelvis, -30))
    aorta, cava = (-13, SPINE + 29, 0), (24, SPINE + 34, -390)
    layers.append(("gallbladder", part["gallbladder"], WATER))
    layers.append(("aorta", ellipsoid(aorta, (10.5, 10.5, ALONG)), hu["aorta"]))
    return [*layers, ("vena cava", ellipsoid(cava, (12, 10.5, 400)), hu["vein"])]


def draw_patient(rng: np.random.Generator) -> Patient:
    """The patient, still without tumours."""
    part = {
        name: ellipsoid(centre + rng.uniform(-5, 5, 3), radii * rng.uniform(0.92, 1.08, 3))
        for name, (centre, radii) in ORGANS.items()
    }
    hu, fat = draw_hu(rng), float(rng.uniform(8, 30))
    domes = part["right dome"].joined(part["left dome"], 30)
    dome = Shape(lambda x, y, z: domes.level(x, y, np.maximum(z, -100)))  # upright walls below
    behind: Layers = [("table", table, TABLE), ("skin", muscles.grown(fat), SOFT)]
    behind += [("fat", muscles.grown(fat - 2), FAT), ("muscle", muscles, MUSCLE)]
    behind += [("neck", ellipsoid((0, -30, 320), (58, 52, 130)), MUSCLE), ("fat", cavity, FAT)]
    behind += [("ribs", Shape(ribs.level, np.array([-np.inf, -np.inf, -185])), BONE)]
    behind += draw_chest(rng, part, hu, dome) + draw_belly(rng, part, hu)
    liver: Layers = [("liver", draw_liver(rng, part, dome), hu["liver"])]
    for start, end, *radii in HEPATIC_TUBES:
        liver.append(("vein", tube(start, end + rng.uniform(-4, 4, 3), *radii), hu["vein"]))
    bend = [draw_waves(rng, 4, (150, 320), 2.5, 3), draw_waves(rng, 4, (60, 140), 1.4, 3)]
    return Patient(np.vstack(bend), behind, liver, draw_front(part, hu, dome), fat)


def add_tumours(rng: np.random.Generator, patient: Patient, centres: np.ndarray, number) -> None:
    """Puts tumours at random ones of `centres`: (n, 3) points inside the liver, reference mm."""
    for centre in rng.permutation(centres)[: rng.integers(number[0], number[1] + 1)]:
        shape = ellipsoid(centre, rng.uniform(6, 22) * rng.uniform(0.8, 1.2, 3))
        patient.liver.append(("tumour", shape, patient.liver[0][2] - float(rng.uniform(35, 65))))


# ---------------------------------------------------------------------------------------------
# scanning: a patient on a voxel grid
# ---------------------------------------------------------------------------------------------


class Canvas:
    """A slab of slices: HU float32, labels uint8, and each voxel's place in the bent body (mm)."""

    def __init__(self, shape: tuple[int, ...], affine: np.ndarray, bend: np.ndarray):
        """`affine` takes voxel indices (X, Y, Z) of this slab to reference mm."""
        self.inverse = np.linalg.inv(affine)
        k, j, i = np.ix_(*(np.arange(n, dtype=np.float32) for n in shape))
        x, y, z = straight = [a * i + b * j + c * k + d for a, b, c, d in affine[:3].tolist()]
        self.mm = [np.broadcast_to(p, shape).copy() for p in straight]
        for kx, ky, kz, phase, *shift in bend.tolist():
            wave = np.cos(kx * x + ky * y + kz * z + phase)
            for p, mm in zip(self.mm, shift, strict=True):
                p += mm * wave
        self.low, self.high = (np.array([f(p) for p in self.mm], float) for f in (np.min, np.max))
        self.edge = max(1.5, float(np.linalg.norm(affine[:3, 0])))  # mm over which voxels mix
        shift = np.abs(bend[:, 4:]).sum(0)
        self.margin = np.abs(self.inverse[:3, :3]) @ shift  # voxels by which the body is bent
        self.hu = np.full(shape, AIR, np.float32)
        self.label = np.zeros(shape, np.uint8)

    def cover(self, shape: Shape) -> tuple[tuple[slice, ...], np.ndarray] | None:
        """The block of voxels around a shape and its share of each; None where it is not."""
        low = np.maximum(shape.low - self.edge, self.low)
        high = np.minimum(shape.high + self.edge, self.high)
        if (low > high).any():
            return None
        corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), -1).reshape(-1, 3)
        voxels = apply_affine(self.inverse, corners)
        first = np.maximum(np.floor(voxels.min(0) - self.margin), 0).astype(int)[::-1]
        last = np.maximum(np.ceil(voxels.max(0) + self.margin) + 1, 0).astype(int)[::-1]
        block = tuple(map(slice, first, last))
        level = shape.level(*(p[block] for p in self.mm))
        return block, np.clip(0.5 - level * (1 / self.edge), 0, 1)

    def paint(self, shape: Shape, hu: float, label: int = 0, inside: np.ndarray | None = None):
        """Blends one shape over what is there; `inside` limits it to another's share."""
        if found := self.cover(shape):
            block, cover = found
            self.blend(block, cover if inside is None else cover * inside[block], hu, label)

    def blend(self, block, cover: np.ndarray, hu: float, label: int) -> None:
        self.hu[block] += cover * (hu - self.hu[block])
        self.label[block][cover > 0.5] = label


def paint(canvas: Canvas, patient: Patient, organ: str, given: np.ndarray | None) -> None:
    """Back to front. A given liver comes last, so that nothing covers a voxel of it."""
    labels = {"liver": 1, "vein": 1, "tumour": 2} if organ == "liver" else {organ: 1}
    (_, liver, liver_hu), *inner = patient.liver
    before, after = patient.behind + patient.front, []
    if given is None:
        before, after = patient.behind, patient.front
    for name, shape, hu in before:
        canvas.paint(shape, hu, labels.get(name, 0))
    if given is None:
        given = np.zeros_like(canvas.hu)
        if found := canvas.cover(liver):
            given[found[0]] = found[1]
    canvas.blend(..., given, liver_hu, labels.get("liver", 0))
    for name, shape, hu in inner:
        canvas.paint(shape, hu, labels.get(name, 0), given)
    for name, shape, hu in after:
        canvas.paint(shape, hu, labels.get(name, 0))


def enlarged(coarse: np.ndarray, factor: int, axis: int, length: int) -> np.ndarray:
    """Linearly by a whole factor along one axis, voxel edges aligned, cut to `length`."""
    last = coarse.shape[axis] - 1
    at = np.clip((np.arange(length, dtype=np.float32) + 0.5) / factor - 0.5, 0, last)
    low = at.astype(int)
    t = np.expand_dims(at - low, tuple(range(1, coarse.ndim - axis)))
    low, high = coarse.take(low, axis), coarse.take(np.minimum(low + 1, last), axis)
    return low + t * (high - low)


def share(mask: np.ndarray, factor: int) -> np.ndarray:
    """(Z, Y, X) mask to the share of it in blocks of factor x factor voxels in-plane."""
    ny, nx = (-n % factor for n in mask.shape[1:])
    blocks = np.pad(mask > 0, ((0, 0), (0, ny), (0, nx))).astype(np.float32)
    rows = reduce(np.add, [blocks[:, n::factor] for n in range(factor)])
    whole = reduce(np.add, [rows[:, :, n::factor] for n in range(factor)])
    return whole * (1 / factor**2)


def scan(
    rng: np.random.Generator,
    patient: Patient,
    shape: tuple[int, int, int],
    to_reference: np.ndarray,
    organ: str,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Image int16 and label uint8, (Z, Y, X); `to_reference` takes voxel indices (X, Y, Z) to mm.

    Around a given mask the body is painted in voxels of about 1.5 mm and enlarged, as blurred as
    a scanner would show it and several times faster; the label keeps the mask's own voxels.
    """
    step = 1 if mask is None else max(1, round(1.5 / np.linalg.norm(to_reference[:3, 0])))
    plane, pad = [-(-n // step) for n in shape[1:]], 96
    depth = max(1, 2**18 // (plane[0] * plane[1]))  # slabs that fit the processor's cache
    # noise correlates over about a voxel; each slice takes a random crop of one of four tiles
    noise = rng.standard_normal((4, shape[1] + pad, shape[2] + pad), dtype=np.float32)
    noise = gaussian_filter(noise, (0, *[rng.uniform(0.6, 1.0)] * 2), mode="wrap")
    noise *= np.float32(rng.uniform(8, 17) / noise.std())
    crops = rng.integers((4, pad, pad), size=(shape[0], 3))
    image, label = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    to_fine = np.diag([step, step, 1.0, 1.0])
    to_fine[:2, 3] = (step - 1) / 2  # the centre of a coarse voxel
    for first in range(0, shape[0], depth):
        slab = slice(first, min(first + depth, shape[0]))
        to_fine[2, 3] = first
        canvas = Canvas((slab.stop - first, *plane), to_reference @ to_fine, patient.bend)
        paint(canvas, patient, organ, None if mask is None else share(mask[slab], step))
        hu = canvas.hu
        if step > 1:
            hu = enlarged(enlarged(hu, step, 1, shape[1]), step, 2, shape[2])
        for n, (tile, j, i) in enumerate(crops[slab]):
            crop = noise[tile, j : j + shape[1], i : i + shape[2]]
            image[first + n] = np.maximum(np.rint(hu[n] + crop), -1024)
        label[slab] = canvas.label.repeat(step, 1).repeat(step, 2)[:, : shape[1], : shape[2]]
        if mask is not None:
            label[slab] = (mask[slab] > 0) * np.maximum(label[slab], 1)
    return image, label


def draw_grid(rng: np.random.Generator, config: Config, index: int, fat: float, liver: np.ndarray):
    """
    Shape (Z, Y, X), affine to patient mm and affine to reference mm of one random scan that holds
    the whole `liver`, (n, 3) points of it in reference mm, and some slices without it at both ends.
    """
    size, count = config.size or 128, int(rng.integers(config.slices[0], config.slices[1] + 1))
    scale = rng.uniform(0.88, 1.1) * rng.uniform(0.95, 1.05, 3) * (1, 1, 0.9)  # the patient's size
    letters = ORIENTATIONS[index % len(ORIENTATIONS)]
    spare = 34 if letters == "oblique" else 16  # mm, also for the bend of the body
    low, high = (liver[:, 2].min() - spare) * scale[2], (liver[:, 2].max() + spare) * scale[2]
    # at most 5 mm, but with few slices rather thicker ones than less of the liver
    thickest = max(5, 1.02 * (high - low) / count)
    thickness = float(np.clip((high - low) * rng.uniform(1.05, 1.4) / count, 1, thickest))
    bottom = low - (count * thickness - (high - low)) * rng.uniform(0.3, 0.7)
    width = float(np.clip((290 + 2 * fat) * scale[0] * rng.uniform(1.03, 1.2), 320, 480))
    tilt = rng.normal(size=3)
    tilt *= np.deg2rad(rng.uniform(4, 8)) / np.linalg.norm(tilt)
    affine = np.eye(4)
    if letters == "oblique":
        letters, affine[:3, :3] = "LPS", Rotation.from_rotvec(tilt).as_matrix()
    affine[:3, :3] *= [-1 if letter in "LPI" else 1 for letter in letters]
    affine[:3, :3] *= (width / size, width / size, thickness)
    middle = (*rng.uniform(-6, 6, 2), bottom + count * thickness / 2)
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array([size, size, count]) - 1) / 2)
    to_reference = np.diag([*(1 / scale), 1]) @ affine
    affine[:3, 3] += rng.uniform((-60, -60, -900), (60, 60, 200))  # where the scanner has its zero
    return (count, size, size), affine, to_reference


# ---------------------------------------------------------------------------------------------
# given livers
# ---------------------------------------------------------------------------------------------


def mask_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; --livers takes a folder of liver masks")
    files = sorted(p for p in folder.glob("[!.]*") if p.name.endswith((".nii", ".nii.gz")))
    if not files:
        raise ValueError(f"{folder}: no .nii or .nii.gz in it; --livers takes a folder of masks")
    return files


def read_mask(path: Path, size: int | None) -> Volume:
    """The mask (X, Y, Z); with `size`, the nearest voxels of a grid of that size in-plane."""
    given = read_file(path)
    mask = given.read()
    if not mask.any():
        raise ValueError(
            f"{path}: expected a 3D liver mask, found no voxel above 0; leave this file out"
        )
    factor = mask.shape[0] / (size or mask.shape[0])
    if factor == 1:
        return given.like(mask)
    near = [((np.arange(round(n / factor)) + 0.5) * factor).astype(int) for n in mask.shape[:2]]
    grid = np.diag([factor, factor, 1, 1])
    grid[:2, 3] = (factor - 1) / 2
    form = nib.Nifti1Image(np.empty((1, 1, 1), np.uint8), given.affine @ grid, given.header)
    affine = form.header.get_best_affine()  # as a file holds it
    return Volume(np.asfortranarray(mask[np.ix_(*near)]), affine, str(path), form.header)


def place_around(mask: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The affine from voxels (X, Y, Z) to reference mm that lays the box of the mask (Z, Y, X) on the
    atlas' liver, and (n, 3) points of the mask in reference mm.

    The bulk of a liver lies to the right in its box. Where a header says left (19 of the LiTS
    volumes carry an identity affine), the whole body is painted as mirrored as that header is.
    """
    step = [max(1, n // 64) for n in mask.shape]
    found = np.argwhere(mask[:: step[0], :: step[1], :: step[2]]) * step
    voxels = (found if len(found) else np.argwhere(mask))[:, ::-1]
    points = apply_affine(affine, voxels)
    low, high = points.min(0), points.max(0)
    middle = (low + high) / 2
    scale = np.maximum(high - low, 20) / np.diff(LIVER_BOX, axis=0)[0]
    scale[2] = np.clip(scale[2], 0.7 * scale[0], 1.4 * scale[0])  # a liver may be cut by the scan
    if points[:, 0].mean() < middle[0] - 5:
        scale[0] *= -1
    fit = np.diag([*(1 / scale), 1])
    fit[:3, 3] = LIVER_BOX.mean(0) - middle / scale
    fit[2, 3] = LIVER_BOX[1, 2] - high[2] / scale[2]  # its top is the dome
    reach = cavity.level(*apply_affine(fit, points).T).max() / CAVITY_MM
    fit = np.diag([1 / (1 + max(0, reach)), 1 / (1 + max(0, reach)), 1, 1]) @ fit  # ribs outside
    return fit @ affine, apply_affine(fit, points)


# ---------------------------------------------------------------------------------------------
# cases and files
# ---------------------------------------------------------------------------------------------


def make_phantom(index: int, config: Config) -> tuple[Volume, Volume]:
    """
    Image (int16 HU) and label (uint8) of case `index`, both (X, Y, Z) on one grid. They depend on
    (seed, index) and on size, slices, tumours and organ; with `livers` on the index-th mask.
    """
    rng = np.random.default_rng([config.seed, index])
    patient = draw_patient(rng)
    if config.livers:
        given = read_mask(mask_files(config.livers)[index], config.size)
        mask, header = given.data.T, given.header
        shape, (to_reference, p) = mask.shape, place_around(mask, given.affine)
        inside = p + np.cos(p @ patient.bend[:, :3].T + patient.bend[:, 3]) @ patient.bend[:, 4:]
    else:
        mask, header = None, nib.Nifti1Header()
        low, high = LIVER_BOX + [[-25], [25]]
        p = rng.uniform(low, high, (4000, 3))
        depth = patient.liver[0][1].level(*p.T)
        room = np.min([part.level(*p.T) for _, part, _ in patient.front], 0)
        inside = p[(depth < -7) & (room > 8)]
        shape, affine, to_reference = draw_grid(rng, config, index, patient.fat, p[depth < 0])
        header.set_xyzt_units("mm")
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
    add_tumours(rng, patient, inside, config.tumours)
    volumes = scan(rng, patient, shape, to_reference, config.organ, mask)
    assert header is not None  # a mask that was read has one
    affine = header.get_best_affine()  # as the file will hold it, and the codes stay the header's
    image, label = (Volume(v.T, affine, header=header) for v in volumes)
    return image, label


def write_case(index: int, config: Config) -> None:
    name = f"phantom_{index:03d}"
    if config.livers:
        name = mask_files(config.livers)[index].name.removesuffix(".gz").removesuffix(".nii")
    name += ".nii.gz" if config.compress else ".nii"
    for folder, volume in zip(("imagesTr", "labelsTr"), make_phantom(index, config), strict=True):
        volume.write(config.destination / folder / name)


def write_dataset_json(config: Config) -> None:
    """Lists every pair on disk, so that batches made by several calls add up."""
    images = sorted(p.name for p in (config.destination / "imagesTr").glob("[!.]*.nii*"))
    names = [name for name in images if (config.destination / "labelsTr" / name).exists()]
    record = {
        "name": "Phantoms",
        "description": "Synthetic abdominal CT of no patient, made by make_phantoms.py",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": LABELS[config.organ],
        "numTraining": len(names),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
        "test": [],
    }
    part = config.destination / ".dataset.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(config.destination / "dataset.json")


def case_indices(config: Config) -> range:
    """The cases to make; settings that cannot work are refused before any work is done."""
    if config.livers and config.organ != "liver":
        raise ValueError("--livers paints given livers, so --organ must be liver")
    for name, least in (("slices", 8), ("tumours", 0)):
        low, high = getattr(config, name)
        if not least <= low <= high:
            raise ValueError(f"--{name} must be {least} <= fewest <= most, got {low} {high}")
    if config.size is not None and config.size < 16:
        raise ValueError(f"--size must be at least 16 voxels in-plane, got {config.size}")
    available = len(mask_files(config.livers)) if config.livers else 1000
    default = available if config.livers else 20
    cases = default if config.cases is None else config.cases
    indices = range(max(config.first, 0), min(config.first + cases, available))
    if config.first < 0 or not indices:
        raise ValueError(f"--first {config.first} --cases {cases}: none of the {available} cases")
    return indices


def main(config: Config) -> None:
    indices = case_indices(config)
    for folder in ("imagesTr", "labelsTr"):
        (config.destination / folder).mkdir(parents=True, exist_ok=True)
    job = partial(write_case, config=config)
    if config.workers > 1:
        with multiprocessing.get_context("spawn").Pool(config.workers) as pool:
            list(tqdm(pool.imap_unordered(job, indices), "phantoms", len(indices), disable=None))
    else:
        list(tqdm(map(job, indices), "phantoms", len(indices), disable=None))
    write_dataset_json(config)
    print(f"{config.destination}: {len(indices)} cases written, dataset.json lists all in it")
    print(f"next: python prepare.py {config.destination}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"make_phantoms: {error}")
