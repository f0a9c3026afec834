"""Make synthetic abdominal CTs that differ as patients, scanners and contrast phases do.

    python benchmarks/bodies.py --destination data/bodies --cases 200 --spacing 4 4 4
    python benchmarks/bodies.py --destination data/painted --livers ../shared/data/lits_labels

`make_phantoms.py` draws one abdomen with random sizes, to test a pipeline; this draws many others,
to train a network that has never seen a real scan: the HU of every organ by contrast phase, how
long the left lobe and how low the right one is, what fills stomach and bowel, how much fat, noise
and blur, how far the scan reaches. With `--livers`, a phantom is painted around each liver mask.
Shapes and conventions are those of `make_phantoms.py`: reference millimetres, x to the patient's
right, y to the front, z to the head, the origin at the liver's dome. Layers are painted back to
front; `hu` is what `draw_hu` draws, tissue → HU.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tyro
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter, gaussian_filter1d, zoom
from scipy.spatial.transform import Rotation
from skimage.measure import block_reduce
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

import data.make_phantoms as atlas
from data.files import write_json
from data.make_phantoms import ALONG, GAS, SPINE, Layers, Shape, cavity, draw_waves, ellipsoid, tube
from data.volumes import Volume


@dataclass
class Config:
    """Which bodies are made, and where they are written."""

    destination: Path = Path("data/bodies")  # folder to write, in Decathlon layout
    cases: int = 200  # number of bodies
    first: int = 0  # index of the first body, for batches (--first 200 --cases 100)
    seed: int = 0  # body i depends on (seed, i) alone: same numbers, same bytes
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)  # mm per voxel, x y z
    tumours: int = 0  # first bodies with tumours of many kinds; the others have few, simple ones
    edition: int = 1  # of lesions; 2: more small and dark ones, trees of vessels, fat at the porta
    slabs: float = 0.25  # share of bodies that are slabs of 40 to 150 mm
    slab_middle: tuple[float, float] = (-170.0, -10.0)  # mm from the dome, of most slabs
    livers: Path | None = None  # folder of liver masks: paint a phantom around each instead
    step: int = 1  # with --livers: use every n-th voxel in plane


# HU by contrast phase: (lowest, highest)
PHASES: dict[str, dict[str, tuple[float, float]]] = {
    "none": {
        "liver": (30, 70), "spleen": (40, 60), "cortex": (25, 42), "medulla": (25, 42),
        "aorta": (32, 50), "vein": (30, 50), "heart": (32, 50), "gland": (25, 50),
    },
    "arterial": {
        "liver": (50, 90), "spleen": (80, 150), "cortex": (120, 220), "medulla": (50, 110),
        "aorta": (180, 400), "vein": (50, 120), "heart": (110, 350), "gland": (60, 120),
    },
    "portal": {
        "liver": (80, 145), "spleen": (85, 145), "cortex": (130, 230), "medulla": (110, 210),
        "aorta": (115, 190), "vein": (120, 200), "heart": (95, 180), "gland": (60, 110),
    },
    "late": {
        "liver": (65, 110), "spleen": (65, 110), "cortex": (85, 180), "medulla": (85, 200),
        "aorta": (75, 130), "vein": (75, 130), "heart": (70, 130), "gland": (50, 95),
    },
}  # fmt: skip
PHASE_SHARES = {"none": 0.15, "arterial": 0.2, "portal": 0.45, "late": 0.2}


def draw_hu(rng: np.random.Generator) -> dict[str, float]:
    """HU of every tissue. Of some organs it is the liver's, which nothing but shape can tell."""
    phase = PHASES[str(rng.choice(list(PHASE_SHARES), p=list(PHASE_SHARES.values())))]
    hu = {name: float(rng.uniform(*span)) for name, span in phase.items()}
    if rng.random() < 0.15:  # fatty
        hu["liver"] -= float(rng.uniform(10, 50))
    for name in ("spleen", "heart", "cortex", "gland"):
        if rng.random() < 0.25:
            hu[name] = hu["liver"] + float(rng.uniform(-12, 12))
    hu["muscle"] = float(rng.uniform(35, 75))
    hu["wall"] = float(rng.uniform(0.6, 1.0) * hu["gland"] + rng.uniform(-5, 25))
    hu["fat"] = float(atlas.FAT + rng.uniform(-15, 12))
    hu["lung"] = float(rng.uniform(-900, -720))
    hu["bone"], hu["spongy"] = float(rng.uniform(220, 480)), float(rng.uniform(100, 240))
    hu["bile"] = float(rng.choice([rng.uniform(-2, 25), rng.uniform(20, 110)], p=[0.85, 0.15]))
    return hu


def draw_body(rng: np.random.Generator) -> tuple[atlas.Patient, float, np.ndarray]:
    """The patient, mm from cavity to skin, and (n, 3) points of the liver in reference mm."""
    hu = draw_hu(rng)
    dome, top = draw_dome(rng)
    trunk, skin = draw_trunk(rng, hu)
    liver = draw_liver(rng, dome, top)
    behind, front = trunk + draw_chest(rng, hu, dome) + draw_bowel(rng, hu), []
    for part in (draw_stomach(rng, hu, dome), draw_spleen(rng, hu, dome)):
        if rng.random() < 0.35:  # they make a dent in the liver, else the liver in them
            front += part
        else:
            behind += part
    if (rim := rng.uniform(-4, 4)) > 0:
        behind.append(("fat", liver.grown(rim).within(cavity.grown(-1)).within(dome), hu["fat"]))
    if rng.random() < 0.12:  # free fluid around it
        behind.append(("fluid", liver.grown(rng.uniform(5, 20)).within(cavity).within(dome),
                       float(rng.uniform(0, 25))))  # fmt: skip
    front += draw_kidneys(rng, hu) + draw_vessels(rng, hu)
    points = rng.uniform((-130, -100, -260), (150, 110, 5), (6000, 3))
    depth = liver.level(*points.T)
    inner = draw_liver_inside(rng, hu) + draw_tumours(rng, points[depth < -6], hu["liver"])
    bend = [draw_waves(rng, 5, (150, 350), rng.uniform(2, 8), 3)]
    bend += [draw_waves(rng, 4, (60, 140), rng.uniform(0.5, 2.5), 3)]
    layers = [("liver", liver, hu["liver"]), *inner]
    return atlas.Patient(np.vstack(bend), behind, layers, front, skin), skin, points[depth < 0]


# The organs: each function draws one anew


def draw_content(rng: np.random.Generator, hu: dict[str, float]) -> float:
    """HU of what fills stomach or bowel: gas, stool, water, food, the like of liver, contrast."""
    kinds = [GAS, rng.uniform(-150, 0), rng.uniform(0, 30), rng.uniform(30, 80)]
    kinds += [hu["liver"] + rng.uniform(-15, 15), rng.uniform(120, 400)]
    return float(kinds[rng.choice(6, p=[0.2, 0.15, 0.2, 0.2, 0.15, 0.1])])


def jitter(rng: np.random.Generator, centre, radii, mm: float, part: float) -> Shape:
    """An ellipsoid whose centre moves by up to `mm` and whose radii change by up to `part`."""
    size = rng.uniform(1 - part, 1 + part, 3) * rng.uniform(1 - part / 2, 1 + part / 2)
    return ellipsoid(np.add(centre, rng.uniform(-mm, mm, 3)), np.multiply(radii, size))


def blade(points, radii, flat: float, crease: float = 10) -> Shape:
    """A chain of tapering tubes through `points`, `flat` times thinner along z, joined softly."""
    squash = np.array([1, 1, flat])
    shapes = []
    for n in range(len(points) - 1):
        part = tube(points[n] * squash, points[n + 1] * squash, radii[n], radii[n + 1])

        def level(x, y, z, of=part.level):
            return of(x, y, z * np.float32(flat)) * np.float32(1 / max(flat, 1))

        shapes.append(Shape(level, part.low / squash, part.high / squash))
    whole = shapes[0]
    for shape in shapes[1:]:
        whole = whole.joined(shape, crease)
    return whole


def draw_dome(rng: np.random.Generator) -> tuple[Shape, np.ndarray]:
    """What lies below the diaphragm, and the top of the right dome, mm."""
    top = np.array([rng.uniform(38, 78), rng.uniform(-10, 70), 0])
    radii = np.array([rng.uniform(76, 92), rng.uniform(86, 108), rng.uniform(70, 104)])
    right = ellipsoid(top - (0, 0, radii[2]), radii)
    lower, height = rng.uniform(-6, 28), rng.uniform(70, 104)
    centre = (rng.uniform(-76, -58), rng.uniform(-6, 10), -lower - height)
    left = ellipsoid(centre, (80, 92, height))
    domes = right.joined(left, rng.uniform(20, 70))
    return Shape(lambda x, y, z: domes.level(x, y, np.maximum(z, -100))), top  # upright below


def draw_left_lobe(rng: np.random.Generator) -> tuple[list[np.ndarray], list[float]]:
    """Points along the left lobe and how thick it is there, mm: short, usual or far to the left.

    It lies on the front wall; a long one may bend behind the stomach or around the spleen.
    """
    reach = [rng.uniform(-45, 0), rng.uniform(-85, -45), rng.uniform(-128, -85)]
    reach = rng.choice(reach, p=[0.35, 0.4, 0.25])
    front, low = rng.uniform(44, 88), rng.uniform(-36, 22)
    start = np.array([25, rng.uniform(12, 55), low + rng.uniform(-85, -50)])
    bend = np.array([reach * 0.5, front, low + rng.uniform(-70, -30)])
    end = np.array([reach, front + rng.uniform(-55, 10), low * 1.2 + rng.uniform(-55, -4)])
    thick = [rng.uniform(30, 54), rng.uniform(14, 46), rng.uniform(1, 28)]
    points = [start, bend, end]
    if reach < -60 and rng.random() < 0.5:
        points.append(np.array([reach - 15, rng.uniform(-50, 15), low + rng.uniform(-70, -20)]))
        thick.append(rng.uniform(6, 24))
    return points, thick


def draw_liver(rng: np.random.Generator, dome: Shape, top: np.ndarray) -> Shape:
    """Right lobe with a lower tip, left lobe with any reach, under the dome and inside the wall."""
    waves = draw_waves(rng, 5, (45, 140), rng.uniform(1, 4), 1).tolist()
    tall = rng.uniform(60, 98)
    lean, middle = rng.uniform(0.2, 0.7), -tall * rng.uniform(0.85, 1.0)
    radii = (rng.uniform(50, 84), rng.uniform(64, 108), tall)
    bulk = ellipsoid((rng.uniform(64, 84), top[1] * 0.4 + rng.uniform(-42, 2), middle), radii)

    def right(x, y, z):  # tapers below towards the flank
        level = bulk.level(x + np.float32(lean) * np.minimum(z - np.float32(middle), 0), y, z)
        for kx, ky, kz, phase, mm in waves:
            level += mm * np.cos(kx * x + ky * y + kz * z + phase)
        return level

    whole = Shape(right, np.array([-60.0, -130, -250]), np.array([200.0, 130, 10]))
    points, thick = draw_left_lobe(rng)
    whole = whole.joined(blade(points, thick, np.exp(rng.uniform(-0.7, 0.8))), rng.uniform(10, 30))
    if rng.random() < 0.6:  # how low the tip of the right lobe comes
        low = rng.uniform(-220, -130)
        tip = np.array([rng.uniform(76, 126), rng.uniform(-25, 40), low])
        knee = np.array([rng.uniform(88, 100), rng.uniform(-10, 20), -110])
        lower = blade([knee, tip], [rng.uniform(34, 56), rng.uniform(8, 24)], 1.0)
        whole = whole.joined(lower, rng.uniform(8, 24))
    whole = whole.joined(jitter(rng, (18, -6, -72), (24, 26, 32), 6, 0.3), 10)  # caudate lobe
    hollow = jitter(rng, (-24, -42, -142), (72, 64, 78), 16, 0.2)
    spine = ellipsoid((0, SPINE + 8, 0), (rng.uniform(32, 44), rng.uniform(34, 46), ALONG))
    gap = rng.uniform(0, 5) if rng.random() < 0.75 else rng.uniform(5, 22)  # fat at the wall
    whole = whole.without(hollow, rng.uniform(6, 20)).without(spine, 10)
    if rng.random() < 0.7:  # the bed of the right kidney
        whole = whole.without(jitter(rng, (58, -60, -182), (38, 40, 74), 10, 0.2), 12)
    if rng.random() < 0.3:  # another hollow, of colon or stomach
        place = np.array([rng.uniform(-40, 90), rng.uniform(20, 80), rng.uniform(-190, -110)])
        whole = whole.without(ellipsoid(place, rng.uniform(25, 50, 3)), 8)
    whole = whole.within(cavity.grown(-gap), rng.uniform(2, 9))
    return whole.within(dome.grown(-rng.uniform(0, 4)), 2)


def draw_liver_inside(rng: np.random.Generator, hu: dict[str, float]) -> Layers:
    """Portal and hepatic veins, which need not be brighter than the liver."""
    trunk = np.array([20, 4, -100]) + rng.uniform(-8, 8, 3)
    fork = trunk + rng.uniform((6, 4, 8), (22, 18, 26))
    cava = np.array([22, -22, -24]) + rng.uniform(-6, 6, 3)
    big = rng.uniform(0.7, 1.3)
    layers: Layers = [("vein", tube(trunk, fork, 8 * big, 7 * big), hu["vein"])]
    for start, low in [(fork, (-40, -45, -110))] * 3 + [(cava, (-40, -30, -80))] * 3:
        end = rng.uniform(low, (110, 60, -40))
        layers.append(("vein", tube(start, end, 5.5 * big, 1.5), hu["vein"]))
    return layers


def draw_tumours(rng: np.random.Generator, inside: np.ndarray, liver_hu: float) -> Layers:
    """Up to five, dark or bright, some with a rim, some cysts, rarely a very large one."""
    layers: Layers = []
    count = int(rng.choice([0, 0, 1, 2, 3, 5]))
    for centre in rng.permutation(inside)[:count]:
        radius = rng.uniform(4, 22) if rng.random() < 0.85 else rng.uniform(22, 50)
        shape = ellipsoid(centre, radius * rng.uniform(0.8, 1.25, 3))
        value = liver_hu + float(rng.choice([rng.uniform(-70, -15), rng.uniform(10, 60)]))
        value = float(rng.uniform(0, 20)) if rng.random() < 0.15 else value
        layers.append(("tumour", shape, value))
        if rng.random() < 0.3:
            core = shape.grown(-0.35 * radius)
            layers.append(("tumour", core, float(rng.uniform(0, max(liver_hu, 0)))))
    return layers


def draw_lump(rng: np.random.Generator, centre: np.ndarray, radius: float) -> Shape:
    """A ball of about `radius` mm: longer, lobed or rough, some of them two that have met."""
    ball = ellipsoid(centre, radius * rng.uniform(0.75, 1.3, 3))
    if rng.random() < 0.3:
        beside = ellipsoid(centre + rng.normal(0, 0.5 * radius, 3), radius * rng.uniform(0.4, 1, 3))
        ball = ball.joined(beside, 0.3 * radius)
    waves = draw_waves(rng, 4, (radius, 3 * radius), rng.uniform(0, 0.15) * radius, 1)
    most = float(np.abs(waves[:, 4]).sum())

    def level(x, y, z):
        rough = [mm * np.cos(a * x + b * y + c * z + d) for a, b, c, d, mm in waves.tolist()]
        return ball.level(x, y, z) + sum(rough)

    return Shape(level, ball.low - most, ball.high + most)


def draw_tumour(rng: np.random.Generator, centre, radius: float, around: float, value: float):
    """Layers of a tumour: its edge sharp, faint or a rim; inside spots, a dead core, lime."""
    whole = core = draw_lump(rng, centre, radius)
    layers, edge = list[Any](), rng.choice(["sharp", "faint", "rim"], p=[0.4, 0.35, 0.25])
    if edge != "sharp" and radius > 4:
        core = whole.grown(-float(rng.uniform(1, 1 + 0.3 * radius)))
        rim = rng.uniform(10, 60) if edge == "rim" else (value - around) / 2
        layers.append(("tumour", whole, around + float(rim)))
    layers.append(("tumour", core, value))
    inner = [(0.4, value + rng.uniform(-20, 20)) for _ in range(rng.integers(5))]
    inner += [(rng.uniform(0.4, 0.8), rng.uniform(5, 30))] * (rng.random() < 0.35)
    inner += [(0.12, rng.uniform(150, 500))] * int(rng.choice([0, 1, 4], p=[0.9, 0.05, 0.05]))
    for size, hu in inner if radius > 7 else ():
        place = centre + rng.normal(0, 0.3 * radius, 3) * (size < 0.5)
        layers.append(("tumour", draw_lump(rng, place, size * radius).within(core), float(hu)))
    return layers


def draw_tree(rng: np.random.Generator, start, step, radius: float, forks: int) -> list[Shape]:
    """A vessel of `radius` mm from `start` along `step`, which parts in two, `forks` times."""
    end, long = start + step, 0.8 * float(np.linalg.norm(step))
    vessels = [tube(start, end, radius, 0.8 * radius)]
    for _ in range(2 * (forks > 0)):
        turned = step / np.linalg.norm(step) + rng.normal(0, 0.45, 3)
        turned *= long / np.linalg.norm(turned)
        vessels += draw_tree(rng, end, turned, radius * rng.uniform(0.5, 0.8), forks - 1)
    return vessels


def draw_porta(rng: np.random.Generator, vein: float) -> tuple[Layers, np.ndarray]:
    """Fat with portal vein, artery and bile duct where they enter the liver, which are none of it;
    and the place in mm where the vein parts."""
    below = np.array([20, 2, -106]) + rng.uniform(-5, 5, 3)
    fork = below + rng.uniform((0, 2, 4), (12, 16, 20))
    paths = [(below, fork), (fork, fork + rng.uniform((4, -14, -4), (18, 0, 8)))]
    paths += [(fork, fork + rng.uniform((-26, 4, 2), (-6, 22, 16)))]
    wide, sheath, layers = rng.uniform(4, 8), rng.uniform(0.3, 3.5), list[Any]()
    thin = [(rng.uniform(1.2, 4.5), rng.uniform(0, 20)), (rng.uniform(1, 2.5), vein * 1.2)]
    fat = float(rng.uniform(-100, 10))
    layers += [("fat", tube(a, b, wide + sheath, 0.7 * wide + sheath), fat) for a, b in paths]
    layers += [("porta", tube(a, b, wide, 0.7 * wide), vein) for a, b in paths]
    for radius, hu in thin:
        away = rng.normal(0, 1, 3)
        away *= (wide + radius) / np.linalg.norm(away)
        for a, b in paths[: rng.integers(1, 4)]:
            layers.append(("porta", tube(a + away, b + away, radius, radius), float(hu)))
    return layers, fork


def draw_lesions(rng: np.random.Generator, liver: Layers, inside: np.ndarray, new: bool) -> Layers:
    """The liver, its veins, look-alikes (uneven perfusion, vessels, bile ducts, cysts), then none
    to eight tumours: anywhere, at the edge or at a vessel. `inside`: (n, 3) points of it, mm. `new`
    ones: to fifteen, smaller and darker, few cysts; vessels are trees; fat at the porta."""
    layers = [layer for layer in liver if layer[0] != "tumour"]
    around, vein, depth = liver[0][2], layers[1][2], liver[0][1].level(*inside.T)
    for _ in range(int(rng.integers(3)) * (rng.random() < 0.5)):
        part, step = draw_lump(rng, rng.choice(inside), rng.uniform(20, 60)), rng.uniform(-14, 14)
        edges = [(part.grown(-6 * n), around + step * n / 3) for n in (1, 2, 3)]
        layers[1:1] = [("vein", shape, float(hu)) for shape, hu in edges]
    for _ in range(int(rng.integers(12))):
        start, wide = rng.choice(inside), rng.uniform(1.2, 4)
        part = tube(start, start + rng.normal(0, 30, 3), wide, 1)
        layers.append(("vein", part, vein if rng.random() < 0.85 else 12.0))
    vein *= rng.uniform(0.95, 1.4) if new else 1
    porta, fork = draw_porta(rng, vein) if new else ([], inside[0])
    roots = [fork, np.array([22, -22, -24]) + rng.uniform(-8, 8, 3)] * 3 if new else []
    for root in roots:
        step = (rng.choice(inside) - root) * 0.4
        tree = draw_tree(rng, root, step, rng.uniform(2.5, 6), 3)
        layers += [("vein", vessel, vein) for vessel in tree]
    near = np.min([part.level(*inside.T) for _, part, _ in layers[1:]], axis=0)
    for _ in range(int(rng.integers(1, 3 if new else 6)) * (rng.random() < (0.1 if new else 0.3))):
        radii = np.exp(rng.uniform(np.log(2.5), np.log(25))) * rng.uniform(0.85, 1.15, 3)
        layers.append(("vein", ellipsoid(rng.choice(inside), radii), float(rng.uniform(-5, 14))))
    dark = 0.92 if new else 0.8
    kinds = [rng.uniform(-100 if new else -75, -22), rng.uniform(25, 50 if new else 70)]
    kind = rng.choice(kinds, p=[dark, 1 - dark])  # a patient's own
    for _ in range(int(rng.integers(1, 16 if new else 9)) * (rng.random() < 0.85)):
        step = float(kind * rng.uniform(0.8, 1.2))
        value = around + (step if around + step > 18 else abs(step))
        value = max(around + step, 12) if new and around > 40 else value
        radius = float(np.exp(rng.uniform(np.log(2.5), np.log(30 if new else 50))))
        places = [inside, inside[depth > -8], inside[np.abs(near) < radius]][rng.integers(3)]
        places = places if len(places) else inside
        layers += draw_tumour(rng, rng.choice(places), radius, around, value)
    return layers + porta


def draw_bones(rng: np.random.Generator, hu: dict[str, float], skin: float) -> Layers:
    """Hips with psoas muscles, spine, pillars of the diaphragm, sometimes arms beside the skin."""
    bones: Layers = []
    for side in (1, -1):
        psoas = tube((side * 30, -56, -120), (side * 60, -14, -390), *rng.uniform(10, 28, 2))
        hip = jitter(rng, (side * 84, -20, -400), (56, 66, 84), 8, 0.1)
        wing = hip.without(hip.grown(-7)).within(Shape(lambda x, y, z: y))
        bones += [("psoas", psoas, hu["muscle"]), ("hip", wing, hu["bone"])]
    for centre, radii, above, value in atlas.VERTEBRAE:
        value = hu["spongy"] if value == 190 else hu["bone"] if value == 320 else value
        cycle = Shape(lambda *p, end=above: 6 * (np.cos(p[2] * (2 * np.pi / atlas.VERTEBRA)) - end))
        bones.append(("spine", ellipsoid(centre, radii).within(cycle), value))
    if rng.random() < 0.7:  # the pillars of the diaphragm
        for side in (1, -1):
            crus = tube((side * 14, -36, -20), (side * 18, -44, -150), *rng.uniform(4, 11, 2))
            bones.append(("crus", crus, hu["muscle"]))
    if rng.random() < 0.15:  # arms beside the body
        out = atlas.HALF_WIDTH + skin + 45
        for side in (1, -1):
            at = np.array([side * out, rng.uniform(-40, 50), 0])
            for radius, value in ((42, hu["fat"]), (34, hu["muscle"]), (11, hu["bone"])):
                bones.append(("arm", ellipsoid(at, (radius, radius, ALONG)), value))
    return bones


def draw_trunk(rng: np.random.Generator, hu: dict[str, float]) -> tuple[Layers, float]:
    """Table, skin, fat, muscle, ribs, spine and hips; and how far the skin is from the cavity."""
    wall, back, fat = rng.uniform(6, 18), rng.uniform(16, 42), rng.uniform(4, 45)
    behind_fat, front_fat = rng.uniform(0, 0.8), rng.uniform(0, 0.6)

    @Shape
    def muscle(x, y, z):
        depth = np.clip((atlas.CAVITY_Y - y) * (1 / atlas.HALF_DEPTH), 0, 1.2)
        flank, level = (x * (1 / 80)) ** 2, cavity.level(x, y, z) - np.float32(wall)
        return level - np.float32(back) * depth * depth / (1 + flank * flank)

    @Shape
    def skin(x, y, z):
        side = (y - atlas.CAVITY_Y) * np.float32(1 / atlas.HALF_DEPTH)
        share = 1 + np.float32(behind_fat) * np.clip(-side, 0, 1)
        return muscle.level(x, y, z) - fat * (share + np.float32(front_fat) * np.clip(side, 0, 1))

    layers: Layers = []
    if rng.random() < 0.9:
        drop = float(np.float32(wall + back + fat * (1 + behind_fat) - 28 + rng.uniform(0, 8)))
        layers.append(("table", Shape(lambda x, y, z: atlas.table.level(x, y + drop, z)),
                       float(rng.choice([rng.uniform(-700, 150), 0], p=[0.8, 0.2]))))  # fmt: skip
    layers += [("skin", skin, atlas.SOFT), ("fat", skin.grown(-2.5), hu["fat"])]
    layers += [("muscle", muscle, hu["muscle"])]
    sheet = muscle.grown(-rng.uniform(2, 6)).without(cavity.grown(rng.uniform(2, 5)))
    if rng.random() < 0.5:  # fat between the layers of the wall
        layers.append(("fat", sheet, float(hu["fat"] * rng.uniform(0.3, 0.9))))
    layers.append(("fat", cavity, hu["fat"] + float(rng.uniform(0, 25))))
    layers.append(("ribs", Shape(atlas.ribs.level, np.array([-np.inf, -np.inf, -185])), hu["bone"]))
    bones = draw_bones(rng, hu, wall + fat)
    return layers + bones, float(wall + fat * (1 + max(behind_fat, front_fat)))


def draw_chest(rng: np.random.Generator, hu: dict[str, float], dome: Shape) -> Layers:
    """Lungs down to the diaphragm, a heart that lies on it, vessels, sometimes fluid."""
    foot = -float(rng.uniform(60, 118))
    lung = cavity.grown(-2).without(dome).within(Shape(lambda x, y, z: foot - z))
    lung = lung._replace(low=np.array([-np.inf, -np.inf, -120]))
    layers: Layers = [("lung", lung, hu["lung"])]
    for side in (1, -1) * 7:
        end = rng.uniform((60, -70, -70), (120, 70, 70)) * (side, 1, 1)
        layers.append(("chest", tube((side * 25, -10, 50), end, 6, 1).within(lung), atlas.SOFT))
    if rng.random() < 0.25:  # fluid or collapsed lung at the back
        level, tilt = float(rng.uniform(-80, -20)), float(rng.uniform(-0.2, 0.3))
        half = float(rng.choice([-1, 1]))
        pool = Shape(lambda x, y, z: np.maximum(y - level - tilt * z, -half * x))
        layers.append(("chest", pool.within(lung), float(rng.uniform(0, 60))))
    middle = ellipsoid((0, -8, 0), (rng.uniform(22, 36), 78, ALONG))
    layers.append(("chest", middle.within(lung), float(rng.uniform(-90, 30))))
    size = rng.uniform(0.8, 1.3)
    radii = np.array([56, 48, 48]) * size * rng.uniform(0.85, 1.15, 3)
    bottom = rng.uniform(-75, -8)  # below the dome means: flattened on it
    centre = np.array([rng.uniform(-45, -8), rng.uniform(18, 48), bottom + radii[2]])
    heart = ellipsoid(centre, radii)
    layers.append(("chest", heart.grown(rng.uniform(0, 9)).within(lung), hu["fat"]))
    layers.append(("chest", heart.within(lung), hu["heart"]))
    muscle = float(hu["heart"] * rng.uniform(0.4, 1.1))
    chamber = jitter(rng, centre + (-12, 6, 0), radii * 0.65, 6, 0.15)
    rim = chamber.grown(rng.uniform(6, 12)).within(heart)
    layers += [("chest", rim.within(lung), muscle), ("chest", chamber.within(lung), hu["heart"])]
    cava = tube((20, -18, -40), centre + (radii[0] * 0.5, -15, 10), 11, 13)
    layers.append(("chest", cava.within(lung), hu["vein"]))
    layers.append(("chest", ellipsoid((-2, -30, 160), (9, 9, 100)).within(lung), GAS))
    return [*layers, ("sternum", jitter(rng, (0, 106, 60), (18, 6, 110), 3, 0.1), hu["spongy"])]


def draw_bowel(rng: np.random.Generator, hu: dict[str, float]) -> Layers:
    """Colon with gas or stool around the belly, loops of small bowel as dense as the fat allows."""
    layers: Layers = []
    low = rng.uniform(-210, -130)
    colon = [(100, -15, -340), (102, -5, low - 20), (88, 25, low)]
    colon += [(40, 62, low - rng.uniform(0, 60)), (-40, 64, low - rng.uniform(-20, 70))]
    colon += [(-92, 30, rng.uniform(-130, -70)), (-108, -20, -150), (-104, -20, -345)]
    small: list[tuple[Any, float]] = []
    for _ in range(int(rng.choice([rng.integers(8, 40), rng.integers(40, 100)]))):
        at, path = rng.uniform((-105, -25, -420), (95, 75, -95)), []
        for _ in range(int(rng.integers(3, 7))):
            path.append(at)
            at = np.clip(at + rng.normal(0, 22, 3), (-112, -40, -430), (105, 84, -80))
        small.append((path, rng.uniform(7, 17)))
    for path, radius in [*small, (colon, rng.uniform(12, 27))]:
        content = draw_content(rng, hu)
        for a, b in pairwise(path):
            a, b = np.asarray(a, float), np.asarray(b, float) + rng.normal(0, 1, 3)
            content = draw_content(rng, hu) if rng.random() < 0.3 else content
            ends = radius * rng.uniform(0.8, 1.2, 2)
            inner = tube(a, b, *(ends - rng.uniform(1.5, 4)))
            layers += [("bowel", tube(a, b, *ends), hu["wall"]), ("bowel", inner, content)]
    return [(name, shape.within(cavity.grown(-1)), value) for name, shape, value in layers]


def draw_stomach(rng: np.random.Generator, hu: dict[str, float], dome: Shape) -> Layers:
    """Empty or full, its content in two levels, with duodenum and pancreas."""
    full = rng.uniform(0.45, 1.35)
    body = jitter(rng, (-66, 20, -66), np.array([42, 40, 52]) * full, 14, 0.2)
    antrum = blade(
        [np.array([-62, 30, -95]), np.array([-25, 48, -118]), np.array([22, 32, -112])]
        + rng.uniform(-10, 10, (3, 3)), [22 * full + 6, 16 * full + 5, 12], 1.0)  # fmt: skip
    whole = body.joined(antrum, 14).within(cavity.grown(-4), 4).within(dome.grown(-4), 5)
    inside = whole.grown(-rng.uniform(2, 7))
    layers: Layers = [("stomach", whole, hu["wall"]), ("stomach", inside, draw_content(rng, hu))]
    if rng.random() < 0.6:  # gas above
        level = float(rng.uniform(15, 60))
        gas = inside.within(Shape(lambda x, y, z: level - y))
        layers.append(("stomach", gas, float(rng.choice([GAS, rng.uniform(-100, 100)]))))
    head = np.array([24, 10, -128]) + rng.uniform(-8, 8, 3)
    pancreas = blade([head, np.array([-20, 14, -112]) + rng.uniform(-10, 10, 3),
                      np.array([-74, -18, -88]) + rng.uniform(-14, 14, 3)],
                     rng.uniform(8, 17, 3), 1.0)  # fmt: skip
    duodenum = blade([np.array([36, 26, -116]), np.array([44, 0, -140]), np.array([36, -14, -175])]
                     + rng.uniform(-8, 8, (3, 3)), rng.uniform(8, 15, 3), 1.0)  # fmt: skip
    layers += [("pancreas", pancreas, hu["gland"]), ("duodenum", duodenum, hu["wall"])]
    return [*layers, ("duodenum", duodenum.grown(-4), draw_content(rng, hu))]


def draw_spleen(rng: np.random.Generator, hu: dict[str, float], dome: Shape) -> Layers:
    """From small to far too large, hollow towards stomach and kidney."""
    size = rng.choice([rng.uniform(0.6, 1.1), rng.uniform(0.9, 1.8)])
    bulk = jitter(rng, (-100, -34, -74), np.array([34, 46, 50]) * size, 12, 0.2)
    inner = jitter(rng, (-62, -20, -80), (40, 44, 50), 10, 0.2)
    spleen = bulk.without(inner, 8).within(cavity.grown(-rng.uniform(1, 6)), 5)
    return [("spleen", spleen.within(dome.grown(-rng.uniform(1, 5)), 4), hu["spleen"])]


def draw_kidneys(rng: np.random.Generator, hu: dict[str, float]) -> Layers:
    """In their fat, with cortex, medulla and sinus; cysts and masses, some as dense as liver."""
    layers: Layers = []
    for side in (1, -1):
        if rng.random() < 0.04:
            continue
        low = rng.uniform(-195, -140) + (8 if side < 0 else 0)
        centre = np.array([side * rng.uniform(54, 76), rng.uniform(-60, -42), low])
        radii = np.array([28, 27, 54]) * rng.uniform(0.85, 1.15)
        lean = tube(centre + (-side * 6, 0, 24), centre + (side * 6, 4, -24), 1, 1)
        kidney = Shape(lambda *p, of=lean, r=radii[0]: of.level(*p) - np.float32(r - 2),
                       lean.low - radii[0], lean.high + radii[0])  # fmt: skip
        if (capsule := rng.uniform(-4, 10)) > 0:
            layers.append(("fat", kidney.grown(capsule).within(cavity.grown(-2)), hu["fat"]))
        layers.append(("kidney", kidney, hu["cortex"]))
        for step in (-20, 0, 20):
            pyramid = ellipsoid(centre + (-side * step * 0.25, 0, step), (15, 14, 9))
            layers.append(("kidney", pyramid, hu["medulla"]))
        sinus = ellipsoid(centre + (-side * 14, 4, 0), (15, 9, 20))
        layers.append(("fat", sinus, float(rng.choice([hu["fat"], atlas.WATER, hu["medulla"]]))))
        if rng.random() < 0.3:
            size = rng.uniform(8, 26) if rng.random() < 0.7 else rng.uniform(26, 55)
            place = centre + rng.uniform((-20, -15, -50), (20, 25, 50))
            kinds = (rng.uniform(0, 20), hu["liver"] + rng.uniform(-25, 25), rng.uniform(20, 120))
            mass = ellipsoid(place, size * rng.uniform(0.8, 1.2, 3)).within(cavity.grown(-2))
            layers.append(("mass", mass, float(rng.choice(kinds))))
        if rng.random() < 0.15:
            gland = jitter(rng, (side * 36, -38, -100), (14, 10, 16), 8, 0.5)
            layers.append(("adrenal", gland, float(hu["liver"] + rng.uniform(-40, 20))))
    return layers


def draw_vessels(rng: np.random.Generator, hu: dict[str, float]) -> Layers:
    """Aorta, vena cava, portal and mesenteric vein, gallbladder, and a mass here and there."""
    wide = rng.uniform(0.8, 1.3)
    aorta = ellipsoid((rng.uniform(-18, -6), SPINE + 30, 0), (10 * wide, 10 * wide, ALONG))
    cava = blade(
        [np.array([22, -20, -22]), np.array([22, -26, -90]), np.array([18, SPINE + 30, -200]),
         np.array([16, SPINE + 28, -420])], rng.uniform(7, 14, 4), 1.0)  # fmt: skip
    portal = blade([np.array([22, 4, -98]), np.array([4, 0, -122]), np.array([6, 12, -200])],
                   rng.uniform(5, 9, 3), 1.0)  # fmt: skip
    layers: Layers = [("aorta", aorta, hu["aorta"]), ("cava", cava, hu["vein"])]
    layers.append(("vein outside", portal, hu["vein"]))
    if rng.random() < 0.8:
        bladder = jitter(rng, (44, 48, -124), (15, 17, 30), 12, 0.35)
        layers.append(("gallbladder", bladder, hu["wall"]))
        layers.append(("gallbladder", bladder.grown(-2), hu["bile"]))
    if rng.random() < 0.5:  # the fissure of the ligament between the lobes
        points = [np.array([-4, 66, -100]), np.array([6, 20, -76])] + rng.uniform(-10, 10, 3)
        fissure = blade(points, rng.uniform(2, 7, 2), 0.6)
        layers.append(("fat", fissure.within(cavity.grown(-2)), hu["fat"] + 20))
    if rng.random() < 0.25:  # of liver-like HU, to the left or far below
        place = rng.uniform((-100, -30, -330), (40, 60, -190))
        mass = ellipsoid(place, rng.uniform(12, 55) * rng.uniform(0.7, 1.3, 3))
        value = hu["liver"] + float(rng.normal(0, 12))
        layers.append(("mass", mass.within(cavity.grown(-3)), value))
    return layers


# The scan


def draw_grid(rng: np.random.Generator, config: Config, skin: float):
    """Shape (Z, Y, X) and the affine from voxels (X, Y, Z) to reference mm of one random scan."""
    scale = rng.uniform(0.85, 1.1) * rng.uniform((0.94, 0.94, 0.8), (1.08, 1.38, 1.08))
    width, depth = 2 * (atlas.HALF_WIDTH + skin) * scale[0], 2 * (105 + skin) * scale[1]
    margin = rng.uniform(-50, -10) if rng.random() < 0.12 else rng.uniform(0, 60)  # cut, or air
    top, bottom = rng.uniform(5, 170), rng.uniform(-420, -190)
    if rng.random() < 0.12:
        top = rng.uniform(-60, 5)
    if rng.random() < 0.15:
        bottom = rng.uniform(-190, -110)
    if rng.random() < config.slabs:  # most of them through the liver
        span = config.slab_middle if rng.random() < 0.7 else (-380, 130)
        middle = rng.uniform(*span)
        half = rng.uniform(20, 75) / scale[2]
        top, bottom = middle + half, middle - half
    mm = np.array([width + margin, depth + margin + 20, (top - bottom) * scale[2]])
    shape = np.maximum(np.round(mm / config.spacing), (16, 16, 2)).astype(int)
    middle = np.array([*rng.uniform(-8, 8, 2), (top + bottom) / 2 * scale[2]])
    turn = Rotation.from_rotvec(np.deg2rad(rng.normal(0, (4, 4, 6)))).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(config.spacing)
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    return tuple(shape[::-1].tolist()), np.diag([*(1 / scale), 1]) @ affine


def scan(rng: np.random.Generator, patient: atlas.Patient, shape, to_reference: np.ndarray):
    """Return image int16 and label uint8, (Z, Y, X): painted, uneven, blurred and noisy."""
    hu, label = atlas.paint_patient(patient, shape, to_reference)
    soft = (hu > -150) & (hu < 300)
    for voxels, most in ((4, 7), (1.5, 12)):  # tissue is nowhere even
        field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), voxels)
        hu += soft * field * np.float32(rng.uniform(0, most) / field.std())
    blur = rng.choice([0, rng.uniform(0, 0.8)]), rng.choice([0, rng.uniform(0, 1.2)])
    hu = gaussian_filter(hu, (blur[1], blur[0], blur[0])) if max(blur) > 0 else hu
    noise = rng.standard_normal(shape, dtype=np.float32)
    if (thick := rng.uniform(-0.8, 0.9)) > 0:  # thick slices, interpolated
        noise = gaussian_filter1d(noise, thick, axis=0)
    if (kernel := rng.uniform(-0.6, 0.7)) > 0:
        noise = gaussian_filter(noise, (0, kernel, kernel))
    hu += noise * np.float32(np.exp(rng.uniform(np.log(2), np.log(32))) / noise.std())
    hu += np.float32(rng.normal(0, 4))
    hu = np.maximum(np.rint(hu), atlas.AIR - 24).astype(np.int16)
    if rng.random() < 0.2:  # nothing was measured in a frame, square or round
        far = np.ix_(*(np.abs(np.linspace(-1, 1, n)) for n in shape[1:]))
        frame = (np.maximum if rng.random() < 0.5 else np.hypot)(*far) > rng.uniform(0.86, 1.05)
        hu[:, frame], label[:, frame] = rng.choice([0, -1024, -2000]), 0
    return hu, label


def make_body(index: int, config: Config) -> tuple[Volume, Volume]:
    """Return image (int16 HU) and label (uint8) of body `index`, (X, Y, Z), by seed and spacing."""
    rng = np.random.default_rng([config.seed, index])
    patient, skin, inside = draw_body(rng)
    if index < config.tumours:
        again = np.random.default_rng([config.seed, index, 1])  # the rest of the body is the same
        patient.liver = draw_lesions(again, patient.liver, inside, config.edition > 1)
    shape, to_reference = draw_grid(rng, config, skin)
    image, label = scan(rng, patient, shape, to_reference)
    affine = np.diag([*config.spacing, 1.0])
    return Volume(image.T, affine), Volume(label.T, affine)


# A phantom around a given liver


def paint_around(path: Path, index: int, config: Config) -> tuple[Volume, Volume]:
    """Return image and label (X, Y, Z) of a phantom around a liver mask, on the mask's grid.

    It is painted in voxels of about 1.5 mm and enlarged; the label keeps the mask's own voxels.
    """
    rng, half = np.random.default_rng([config.seed, index]), config.step // 2
    given = nib.load(path).slicer[half :: config.step, half :: config.step]
    mask = np.asanyarray(given.dataobj).T > 0
    patient = atlas.draw_patient(rng)
    to_reference, points = place_around(mask, given.affine)
    waves = np.cos(points @ patient.bend[:, :3].T + patient.bend[:, 3])
    centres, liver_hu = points + waves @ patient.bend[:, 4:], patient.liver[0][2]
    for centre in rng.permutation(centres)[: rng.integers(5)]:
        tumour = ellipsoid(centre, rng.uniform(6, 22) * rng.uniform(0.8, 1.2, 3))
        patient.liver.append(("tumour", tumour, liver_hu - float(rng.uniform(35, 65))))
    step = max(1, round(1.5 / np.linalg.norm(to_reference[:3, 0])))
    shares = block_reduce(mask.astype(np.float32), (1, step, step), np.mean)
    hu, label = np.empty(mask.shape, np.float32), np.empty(mask.shape, np.uint8)
    for z, share in enumerate(shares):
        to_fine = np.diag([step, step, 1.0, 1.0])
        to_fine[:3, 3] = ((step - 1) / 2, (step - 1) / 2, z)  # the centre of a coarse voxel
        canvas = atlas.Canvas((1, *share.shape), to_reference @ to_fine, patient.bend)
        for _, part, value in patient.behind + patient.front:
            canvas.paint(part, value)
        canvas.hu += share * (liver_hu - canvas.hu)
        for name, part, value in patient.liver[1:]:
            canvas.paint(part, value, 2 if name == "tumour" else 1, share[None])
        size = {"grid_mode": True, "mode": "nearest"}
        fine = zoom(canvas.hu[0], step, order=1, **size)[: mask.shape[1], : mask.shape[2]]
        tumours = canvas.label[0].repeat(step, 0).repeat(step, 1)[: mask.shape[1], : mask.shape[2]]
        hu[z], label[z] = fine, mask[z] * np.maximum(tumours, 1)
    noise = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0, 0.8, 0.8))
    hu += noise * np.float32(rng.uniform(8, 17) / noise.std())
    image = np.maximum(np.rint(hu), atlas.AIR - 24).astype(np.int16)
    grid = Volume(image.T, given.affine, header=given.header)
    return grid, grid.like(label.T)


def place_around(mask: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine from voxels (X, Y, Z) to reference mm that lays the box of a mask (Z, Y, X)
    on the atlas' liver, and (n, 3) points of the mask in reference mm.

    The bulk of a liver lies to the right in its box. Where a header says left (19 of the LiTS
    volumes carry an identity affine), the whole body is painted as mirrored as that header is.
    """
    step = [max(1, n // 64) for n in mask.shape]
    found = np.argwhere(mask[:: step[0], :: step[1], :: step[2]]) * step
    voxels = (found if len(found) else np.argwhere(mask))[:, ::-1]
    points = apply_affine(affine, voxels)
    low, high = points.min(0), points.max(0)
    middle = (low + high) / 2
    scale = np.maximum(high - low, 20) / np.diff(atlas.LIVER_BOX, axis=0)[0]
    scale[2] = np.clip(scale[2], 0.7 * scale[0], 1.4 * scale[0])  # a liver may be cut by the scan
    if points[:, 0].mean() < middle[0] - 5:
        scale[0] *= -1
    fit = np.diag([*(1 / scale), 1])
    fit[:3, 3] = atlas.LIVER_BOX.mean(0) - middle / scale
    fit[2, 3] = atlas.LIVER_BOX[1, 2] - high[2] / scale[2]  # its top is the dome
    reach = cavity.level(*apply_affine(fit, points).T).max() / atlas.CAVITY_MM
    fit = np.diag([1 / (1 + max(0, reach)), 1 / (1 + max(0, reach)), 1, 1]) @ fit  # ribs outside
    return fit @ affine, apply_affine(fit, points)


def main(config: Config) -> None:
    masks = sorted(config.livers.glob("[!.]*.nii*")) if config.livers else []
    last = min(config.first + config.cases, len(masks) if config.livers else sys.maxsize)
    for index in tqdm(range(config.first, last), "bodies", disable=None):
        if config.livers:
            name, pair = masks[index].name, paint_around(masks[index], index, config)
        else:
            name, pair = f"body_{index:05d}.nii.gz", make_body(index, config)
        for folder, volume in zip(("imagesTr", "labelsTr"), pair, strict=True):
            volume.write(config.destination / folder / name)
    record = {"name": "Bodies", "description": "Synthetic abdominal CT of no patient"}
    record |= {"labels": dict(zip("012", atlas.LABELS["liver"], strict=True))}
    write_json(record | {"modality": {"0": "CT"}}, config.destination / "dataset.json")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
