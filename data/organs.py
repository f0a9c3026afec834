"""The organs of `make_bodies.py`: each function draws one anew, as layers of shapes with HU.

Shapes and conventions are those of `make_phantoms.py`: reference millimetres, x to the patient's
right, y to the front, z to the head, the origin at the height of the liver's dome. `hu` is what
`make_bodies.draw_hu` draws: tissue → HU. Layers are painted back to front.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from make_phantoms import (
    ALONG,
    CAVITY_Y,
    GAS,
    HALF_DEPTH,
    HALF_WIDTH,
    SOFT,
    SPINE,
    VERTEBRAE,
    WATER,
    Layers,
    Shape,
    between_discs,
    cavity,
    draw_waves,
    ellipsoid,
    ribs,
    table,
    tube,
)


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
    top = np.array([rng.uniform(52, 76), rng.uniform(-6, 14), 0])
    radii = np.array([rng.uniform(76, 92), rng.uniform(86, 108), rng.uniform(70, 104)])
    right = ellipsoid(top - (0, 0, radii[2]), radii)
    lower, height = rng.uniform(2, 30), rng.uniform(70, 104)
    left = ellipsoid(
        (rng.uniform(-76, -58), rng.uniform(-6, 10), -lower - height), (80, 92, height)
    )
    domes = right.joined(left, rng.uniform(20, 70))
    return Shape(lambda x, y, z: domes.level(x, y, np.maximum(z, -100))), top  # upright below


def draw_left_lobe(rng: np.random.Generator) -> tuple[list[np.ndarray], list[float]]:
    """Points along the left lobe and how thick it is there, mm: short, usual or far to the left."""
    reach = rng.choice([rng.uniform(-45, 0), rng.uniform(-85, -45), rng.uniform(-125, -85)])
    front = rng.uniform(30, 58)
    start = np.array([25, rng.uniform(25, 48), rng.uniform(-85, -50)])
    bend = np.array([reach * 0.5, front, rng.uniform(-75, -35)])
    end = np.array([reach, front + rng.uniform(-35, 15), rng.uniform(-70, -25)])
    thick = [rng.uniform(36, 56), rng.uniform(22, 42), rng.uniform(4, 20)]
    points = [start, bend, end]
    if reach < -85 and rng.random() < 0.5:  # around the spleen
        points.append(np.array([-118, rng.uniform(-40, 10), rng.uniform(-60, -25)]))
        thick.append(rng.uniform(6, 16))
    return points, thick


def draw_liver(rng: np.random.Generator, dome: Shape, top: np.ndarray) -> Shape:
    """Right lobe with a lower tip, left lobe with any reach, under the dome and inside the wall."""
    waves = draw_waves(rng, 5, (45, 140), rng.uniform(1, 4), 1).tolist()
    tall = rng.uniform(70, 104)
    lean, middle = rng.uniform(0.1, 0.5), -tall * rng.uniform(0.85, 1.0)
    radii = (rng.uniform(60, 86), rng.uniform(72, 106), tall)
    bulk = ellipsoid((rng.uniform(60, 78), rng.uniform(-8, 12), middle), radii)

    def right(x, y, z):  # tapers below towards the flank
        level = bulk.level(x + np.float32(lean) * np.minimum(z - np.float32(middle), 0), y, z)
        for kx, ky, kz, phase, mm in waves:
            level += mm * np.cos(kx * x + ky * y + kz * z + phase)
        return level

    whole = Shape(right, np.array([-60.0, -130, -250]), np.array([200.0, 130, 10]))
    points, thick = draw_left_lobe(rng)
    whole = whole.joined(blade(points, thick, rng.uniform(0.8, 1.6)), rng.uniform(10, 30))
    if rng.random() < 0.6:  # how low the tip of the right lobe comes
        low = rng.uniform(-250, -150)
        tip = np.array([rng.uniform(80, 108), rng.uniform(-25, 40), low])
        knee = np.array([92, rng.uniform(-10, 20), -110])
        whole = whole.joined(
            blade([knee, tip], [rng.uniform(34, 56), rng.uniform(8, 24)], 1.0), rng.uniform(8, 24)
        )
    whole = whole.joined(jitter(rng, (18, -6, -72), (24, 26, 32), 6, 0.3), 10)  # caudate lobe
    hollow = jitter(rng, (-24, -42, -142), (72, 64, 78), 16, 0.2)
    spine = ellipsoid((0, SPINE + 8, 0), (rng.uniform(32, 44), rng.uniform(34, 46), ALONG))
    gap = rng.uniform(0, 5)
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
    for _ in range(3):
        end = rng.uniform((-40, -45, -110), (110, 60, -40))
        layers.append(("vein", tube(fork, end, 5.5 * big, 1.5), hu["vein"]))
    for _ in range(3):
        end = rng.uniform((-40, -30, -80), (110, 60, -40))
        layers.append(("vein", tube(cava, end, 5.5 * big, 1.5), hu["vein"]))
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


def draw_bones(rng: np.random.Generator, hu: dict[str, float], skin: float) -> Layers:
    """Hips with psoas muscles, spine, pillars of the diaphragm, sometimes arms beside the skin."""
    bones: Layers = []
    for side in (1, -1):
        psoas = tube((side * 30, -56, -120), (side * 60, -14, -390), *rng.uniform(10, 28, 2))
        hip = jitter(rng, (side * 84, -20, -400), (56, 66, 84), 8, 0.1)
        wing = hip.without(hip.grown(-7)).within(Shape(lambda x, y, z: y))
        bones += [("psoas", psoas, hu["muscle"]), ("hip", wing, hu["bone"])]
    for centre, radii, above, value in VERTEBRAE:
        value = hu["spongy"] if value == 190 else hu["bone"] if value == 320 else value
        bones.append(("spine", ellipsoid(centre, radii).within(between_discs(above)), value))
    if rng.random() < 0.7:  # the pillars of the diaphragm
        for side in (1, -1):
            crus = tube((side * 14, -36, -20), (side * 18, -44, -150), *rng.uniform(4, 11, 2))
            bones.append(("crus", crus, hu["muscle"]))
    if rng.random() < 0.15:  # arms beside the body
        out = HALF_WIDTH + skin + 45
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
        depth, flank = np.clip((CAVITY_Y - y) * (1 / HALF_DEPTH), 0, 1.2), (x * (1 / 80)) ** 2
        level = cavity.level(x, y, z)
        return level - np.float32(wall) - np.float32(back) * depth * depth / (1 + flank * flank)

    @Shape
    def skin(x, y, z):
        side = (y - CAVITY_Y) * np.float32(1 / HALF_DEPTH)
        share = 1 + np.float32(behind_fat) * np.clip(-side, 0, 1)
        return muscle.level(x, y, z) - fat * (share + np.float32(front_fat) * np.clip(side, 0, 1))

    layers: Layers = []
    if rng.random() < 0.9:
        drop = float(np.float32(wall + back + fat * (1 + behind_fat) - 28 + rng.uniform(0, 8)))
        layers.append(("table", Shape(lambda x, y, z: table.level(x, y + drop, z)),
                       float(rng.uniform(-700, 150))))  # fmt: skip
    layers += [("skin", skin, SOFT), ("fat", skin.grown(-2.5), hu["fat"])]
    layers += [("muscle", muscle, hu["muscle"])]
    sheet = muscle.grown(-rng.uniform(2, 6)).without(cavity.grown(rng.uniform(2, 5)))
    if rng.random() < 0.5:  # fat between the layers of the wall
        layers.append(("fat", sheet, float(hu["fat"] * rng.uniform(0.3, 0.9))))
    layers.append(("fat", cavity, hu["fat"] + float(rng.uniform(0, 25))))
    layers.append(("ribs", Shape(ribs.level, np.array([-np.inf, -np.inf, -185])), hu["bone"]))
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
        layers.append(("chest", tube((side * 25, -10, 50), end, 6, 1).within(lung), SOFT))
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
    colon = [
        (100, -15, -340),
        (102, -5, low - 20),
        (88, 25, low),
        (40, 62, low - rng.uniform(0, 60)),
    ]
    colon += [(-40, 64, low - rng.uniform(-20, 70)), (-92, 30, rng.uniform(-130, -70))]
    colon += [(-108, -20, -150), (-104, -20, -345)]
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
        layers.append(("fat", sinus, float(rng.choice([hu["fat"], WATER, hu["medulla"]]))))
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
        layers += [
            ("gallbladder", bladder, hu["wall"]),
            ("gallbladder", bladder.grown(-2), hu["bile"]),
        ]
    if rng.random() < 0.5:  # the fissure of the ligament between the lobes
        points = [np.array([-4, 66, -100]), np.array([6, 20, -76])] + rng.uniform(-10, 10, 3)
        fissure = blade(points, rng.uniform(2, 7, 2), 0.6)
        layers.append(("fat", fissure.within(cavity.grown(-2)), hu["fat"] + 20))
    if rng.random() < 0.25:  # of liver-like HU, to the left or far below
        place = rng.uniform((-100, -30, -330), (40, 60, -190))
        mass = ellipsoid(place, rng.uniform(12, 55) * rng.uniform(0.7, 1.3, 3))
        layers.append(
            ("mass", mass.within(cavity.grown(-3)), hu["liver"] + float(rng.normal(0, 12)))
        )
    return layers
