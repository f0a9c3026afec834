"""Make synthetic abdominal CTs, so that the whole pipeline runs with nothing downloaded.

    python data/make_phantoms.py --destination data/raw --cases 20 --seed 0

One atlas of the abdomen is written down below in reference millimetres: x to the patient's RIGHT,
y to the front, z to the head, the origin on the body axis at the height of the liver's dome. An
organ is an implicit function, negative inside and roughly a distance in millimetres. A patient is
the atlas with random sizes, bent by a few smooth waves and scaled; a scan is that patient sampled
on a voxel grid, so orientation and spacing cannot break the anatomy. Arrays are (Z, Y, X) in here.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

# Run as a script, the folder above is not where Python looks for `data`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # says which environment is missing  # noqa: F401

# isort: split
from data.settings import read_settings, run_script


@dataclass
class Config:
    """Which phantoms are made, and where they are written."""

    destination: Path = Path("data/raw")  # folder to write, in Decathlon layout
    cases: int = 20  # number of cases
    first: int = 0  # index of the first case, for batches (--first 20 --cases 20)
    seed: int = 0  # case i depends on (seed, i) alone: same numbers, same bytes
    size: int = 128  # voxels in-plane
    slices: tuple[int, int] = (40, 72)  # fewest and most slices
    tumours: tuple[int, int] = (0, 4)  # fewest and most tumours in a liver
    organ: Literal["liver", "spleen"] = "liver"  # organ of the label map


if __name__ == "__main__":  # help and mistakes need no heavy library
    CONFIG = read_settings(Config, __doc__)

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from data.files import InputError, write_json
from data.settings import show_progress
from data.volumes import Volume

# The atlas: HU and reference millimetres (x right, y front, z head)
LABELS = {"liver": ("background", "liver", "tumour"), "spleen": ("background", "spleen")}
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
ABOVE_LIVER = {  # HU; spleen and kidneys are so close that HU cannot tell them from the liver
    "liver": (0, 0), "spleen": (-8, 12), "kidney": (-5, 35), "pancreas": (-25, -5),
    "vein": (30, 50), "aorta": (40, 70), "heart": (20, 45),
}  # fmt: skip
VERTEBRAE = [  # columns: centre, radii, how far they reach towards the disc (-1 .. 1), HU
    ((0, SPINE - 30, 0), (44, 5, ALONG), -0.3, BONE),  # transverse processes
    ((0, SPINE - 48, 0), (4.5, 22, ALONG), 0.2, BONE),  # spinous process
    ((0, SPINE - 27, 0), (17, 15, ALONG), 0.6, BONE),  # arch
    ((0, SPINE - 27, 0), (10, 9, ALONG), 1, SOFT),  # canal
    ((0, SPINE, 0), (23, 18, ALONG), 1, DISC),
    ((0, SPINE, 0), (23, 18, ALONG), 0.72, BONE),
    ((0, SPINE, 0), (20, 15, ALONG), 0.3, SPONGY),
]


# Shapes: functions of float32 arrays x, y, z (mm), negative inside
class Shape(NamedTuple):
    """An implicit function and the box (mm) outside which it is positive."""

    level: Callable[..., np.ndarray]  # (x, y, z) → about the distance in mm to the surface
    low: np.ndarray = np.full(3, -np.inf)
    high: np.ndarray = np.full(3, np.inf)

    def grown(self, mm: float) -> "Shape":
        return Shape(lambda *p: self.level(*p) - mm, self.low - mm, self.high + mm)

    def within(self, other: "Shape", mm: float = 0) -> "Shape":
        """Return the intersection, its crease rounded over `mm`."""

        def level(*p):
            a, b = self.level(*p), other.level(*p)
            return 0.5 * (a + b + np.sqrt((a - b) ** 2 + mm * mm)) if mm else np.maximum(a, b)

        return Shape(level, self.low, self.high)

    def without(self, other: "Shape", mm: float = 0) -> "Shape":
        return self.within(Shape(lambda *p: -other.level(*p)), mm)

    def joined(self, other: "Shape", mm: float) -> "Shape":
        """Return the union, its crease filled over `mm`."""
        outside = Shape(lambda *p: -self.level(*p)).without(other, mm)
        low, high = np.minimum(self.low, other.low) - mm, np.maximum(self.high, other.high) + mm
        return Shape(lambda *p: -outside.level(*p), low, high)


def ellipsoid(centre, radii) -> Shape:
    """Return an ellipsoid; a column where a radius is infinite."""
    centre, radii = np.asarray(centre, float), np.asarray(radii, float)
    # as Python floats, because a float64 scalar would turn float32 arrays into float64
    c, inverse, least = centre.tolist(), (1 / radii).tolist(), float(radii.min())
    axes = [n for n in range(3) if inverse[n]]  # 0 along a column
    return Shape(
        lambda *p: (np.sqrt(sum(((p[n] - c[n]) * inverse[n]) ** 2 for n in axes)) - 1) * least,
        centre - radii,
        centre + radii,
    )


def tube(start, end, r0: float, r1: float) -> Shape:
    """Return a straight vessel or muscle whose radius goes from r0 to r1."""
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
    """Return the inside of the trunk, between ellipse and rectangle in cross-section."""
    u, v = (x * (1 / HALF_WIDTH)) ** 2, ((y - CAVITY_Y) * (1 / HALF_DEPTH)) ** 2
    radius = np.sqrt(np.sqrt(u * u + v * v + 1.3 * u * v))
    return (radius + (np.maximum(z - 130, 0) * (1 / 150)) ** 2 - 1) * CAVITY_MM


@Shape
def muscles(x, y, z) -> np.ndarray:
    """Return the cavity and its wall, which is thickest beside the spine."""
    back, flank = np.clip((CAVITY_Y - y) * (1 / HALF_DEPTH), 0, 1.2), (x * (1 / 80)) ** 2
    return cavity.level(x, y, z) - 11 - 22 * back * back / (1 + flank * flank)


table = Shape(
    lambda x, y, z: np.maximum(
        np.abs(np.sqrt(x * x + (y - 250) ** 2) - 425) - 3, np.maximum(y + 110, np.abs(x) - 210)
    )
)


@Shape
def ribs(x, y, z) -> np.ndarray:
    """Return rings in the wall that fall towards the front, down to the costal arch."""
    rings = 6 * (0.45 - np.cos((z + 0.5 * y) * (2 * np.pi / 29)))
    rings = np.maximum(rings, np.abs(cavity.level(x, y, z) - 5) - 4)
    return np.maximum(rings, np.maximum(0.75 * y - 112 - z, 26 - np.abs(x)))


# The patient: layers of shapes, back to front
Layers = list[tuple[str, Shape, float]]  # name, shape, HU


@dataclass
class Patient:
    bend: np.ndarray  # (waves, 7): wave vector (1/mm), phase, displacement (mm) of the whole body
    behind: Layers
    liver: Layers  # the liver, then the veins and tumours in it
    front: Layers
    fat: float  # under the skin, mm


def draw_liver(rng: np.random.Generator, part: dict[str, Shape], dome: Shape) -> Shape:
    """Return two lobes inside ribs and dome, hollow towards kidney, stomach and spine."""
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
    """Return lungs down to the diaphragm, between them heart and mediastinum."""
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
    """Return psoas muscles, hip bones, bowel with gas, stool or fluid, pancreas and spine."""
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
        cycle = Shape(lambda *p, end=reach: 6 * (np.cos(p[2] * (2 * np.pi / VERTEBRA)) - end))
        layers.append(("spine", ellipsoid(centre, radii).within(cycle), value))
    return layers


def draw_front(part: dict[str, Shape], hu: dict, dome: Shape) -> Layers:
    """Return spleen, stomach, kidneys, gallbladder, aorta and vena cava."""
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
    """Return a random patient, still without tumours, in the portal venous phase."""
    part = {
        name: ellipsoid(centre + rng.uniform(-5, 5, 3), radii * rng.uniform(0.92, 1.08, 3))
        for name, (centre, radii) in ORGANS.items()
    }
    liver_hu = rng.uniform(84, 120)
    hu = {name: float(liver_hu + rng.uniform(*span)) for name, span in ABOVE_LIVER.items()}
    hu |= {"stomach": float(rng.uniform(5, 100)), "wall": float(rng.uniform(45, 90))}
    fat, domes = float(rng.uniform(8, 30)), part["right dome"].joined(part["left dome"], 30)
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


def draw_waves(rng: np.random.Generator, n: int, lengths, mm: float, axes: int) -> np.ndarray:
    """Return (n, 4 + axes): plane waves of random direction, length (mm), phase and amplitude."""
    vector = rng.normal(size=(n, 3))
    vector *= 2 * np.pi / np.linalg.norm(vector, axis=1, keepdims=True)
    phase, amplitude = rng.uniform(0, 2 * np.pi, (n, 1)), rng.uniform(-mm, mm, (n, axes))
    return np.hstack([vector / rng.uniform(lengths[0], lengths[1], (n, 1)), phase, amplitude])


# Scanning: a patient on a voxel grid
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

    def paint(self, shape: Shape, hu: float, label: int = 0, inside: np.ndarray | None = None):
        """Blend a shape over what is there, limited to the shares `inside` (Z, Y, X). Return the
        block of voxels around the shape and its share of each; None where it is not."""
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
        share = np.clip(0.5 - level * (1 / self.edge), 0, 1)
        share = share if inside is None else share * inside[block]
        self.hu[block] += share * (hu - self.hu[block])
        self.label[block][share > 0.5] = label
        return block, share


def paint_patient(
    patient: Patient, shape: tuple[int, ...], to_reference: np.ndarray, organ: str = "liver"
) -> tuple[np.ndarray, np.ndarray]:
    """Return HU float32 and label uint8 (Z, Y, X); `to_reference` takes voxels (X, Y, Z) to mm."""
    hu, label = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    values = {"liver": 1, "vein": 1, "tumour": 2} if organ == "liver" else {organ: 1}
    depth = max(1, 2**18 // (shape[1] * shape[2]))  # slabs that fit the processor's cache
    for first in range(0, shape[0], depth):
        slab, place = slice(first, min(first + depth, shape[0])), np.eye(4)
        place[2, 3] = first
        canvas = Canvas((slab.stop - first, *shape[1:]), to_reference @ place, patient.bend)
        inside = np.zeros_like(canvas.hu)  # the liver's share, which limits its veins and tumours
        for name, part, value in patient.behind + patient.liver + patient.front:
            limit = inside if name in ("vein", "tumour") else None
            painted = canvas.paint(part, value, values.get(name, 0), limit)
            if painted and name == "liver":
                inside[painted[0]] = painted[1]
        hu[slab], label[slab] = canvas.hu, canvas.label
    return hu, label


def draw_grid(rng: np.random.Generator, config: Config, index: int, fat: float, liver: np.ndarray):
    """Return shape (Z, Y, X), affine to patient mm and affine to reference mm of a random scan. It
    holds the whole `liver`, (n, 3) points in reference mm, and slices without it at both ends."""
    size, count = config.size, int(rng.integers(config.slices[0], config.slices[1] + 1))
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


# Cases and files
def make_phantom(index: int, config: Config) -> tuple[Volume, Volume]:
    """Return image (int16 HU) and label (uint8) of case `index`, both (X, Y, Z) on one grid. They
    depend on (seed, index) and on size, slices, tumours and organ alone."""
    rng = np.random.default_rng([config.seed, index])
    patient = draw_patient(rng)
    low, high = LIVER_BOX + [[-25], [25]]
    points = rng.uniform(low, high, (4000, 3))
    _, liver, liver_hu = patient.liver[0]
    depth, room = liver.level(*points.T), [part.level(*points.T) for _, part, _ in patient.front]
    shape, affine, to_reference = draw_grid(rng, config, index, patient.fat, points[depth < 0])
    centres = rng.permutation(points[(depth < -7) & (np.min(room, 0) > 8)])
    for centre in centres[: rng.integers(config.tumours[0], config.tumours[1] + 1)]:
        tumour = ellipsoid(centre, rng.uniform(6, 22) * rng.uniform(0.8, 1.2, 3))
        patient.liver.append(("tumour", tumour, liver_hu - float(rng.uniform(35, 65))))
    # noise correlates over about a voxel; each slice takes a random crop of one of four tiles
    pad = 96
    noise = rng.standard_normal((4, shape[1] + pad, shape[2] + pad), dtype=np.float32)
    noise = gaussian_filter(noise, (0, *[rng.uniform(0.6, 1.0)] * 2), mode="wrap")
    noise *= np.float32(rng.uniform(8, 17) / noise.std())
    hu, label = paint_patient(patient, shape, to_reference, config.organ)
    for flat, (tile, j, i) in zip(hu, rng.integers((4, pad, pad), size=(len(hu), 3)), strict=True):
        flat += noise[tile, j : j + shape[1], i : i + shape[2]]
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    affine = header.get_best_affine()  # as the file will hold it
    image = np.maximum(np.rint(hu), -1024).astype(np.int16)
    return Volume(image.T, affine, header=header), Volume(label.T, affine, header=header)


def main(config: Config) -> None:
    for name, least in (("slices", 8), ("tumours", 0)):
        low, high = getattr(config, name)
        if not least <= low <= high:
            raise InputError(f"--{name} must be {least} <= fewest <= most, got {low} {high}")
    if config.size < 16 or config.first < 0 or config.cases < 1:
        told = f"--size {config.size} --first {config.first} --cases {config.cases}"
        raise InputError(f"{told}: must be at least 16, 0 and 1")
    for index in show_progress(range(config.first, config.first + config.cases), unit="phantom"):
        for folder, volume in zip(
            ("imagesTr", "labelsTr"), make_phantom(index, config), strict=True
        ):
            volume.write(config.destination / folder / f"phantom_{index:03d}.nii.gz")
    names = sorted(path.name for path in (config.destination / "labelsTr").glob("[!.]*.nii*"))
    record = {
        "name": "Phantoms",
        "description": "Synthetic abdominal CT of no patient, made by make_phantoms.py",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(LABELS[config.organ])},
        "numTraining": len(names),
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
    }
    write_json(record, config.destination / "dataset.json")  # lists cases of earlier calls too
    print(f"{config.cases} cases written; next: python prepare.py {config.destination}")


if __name__ == "__main__":
    run_script(main, CONFIG)
