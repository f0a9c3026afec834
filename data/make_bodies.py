"""Make synthetic abdominal CTs that differ as patients, scanners and contrast phases do.

    python data/make_bodies.py --destination data/bodies --cases 200 --spacing 4 4 4

`make_phantoms.py` draws one abdomen with jittered numbers, to test a pipeline; this draws many
different ones, to train a network that has never seen a real scan. Shapes and conventions are
those of `make_phantoms.py` (reference mm: x to the patient's right, y to the front, z to the head,
the origin at the liver's dome), but here everything is drawn anew for each body: the HU of every
organ by contrast phase, how long the left lobe and how low the right one is, whether the heart
lies on the dome, what fills stomach and bowel, how much fat, noise, blur, how far the scan reaches.
The arrays are drawn on the grid that the network is trained on, which makes a body take a second.
"""

import json
import multiprocessing
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import tyro
from isal import igzip
from make_phantoms import AIR, FAT, HALF_WIDTH, Canvas, Patient, cavity, draw_waves, paint
from organs import (
    draw_bowel,
    draw_chest,
    draw_dome,
    draw_kidneys,
    draw_liver,
    draw_liver_inside,
    draw_spleen,
    draw_stomach,
    draw_trunk,
    draw_tumours,
    draw_vessels,
)
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.spatial.transform import Rotation
from tqdm import tqdm


@dataclass
class Config:
    destination: Path = Path("data/bodies")  # folder to write, in Decathlon layout
    cases: int = 200  # number of bodies
    first: int = 0  # index of the first body, for batches (--first 200 --cases 100)
    seed: int = 0  # body i depends on (seed, i) alone: same numbers, same bytes
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)  # mm per voxel, x y z
    workers: int = 1  # processes; the bytes do not depend on it


# ---------------------------------------------------------------------------------------------
# what differs from body to body: HU
# ---------------------------------------------------------------------------------------------

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
    hu["fat"] = float(FAT + rng.uniform(-15, 12))
    hu["lung"] = float(rng.uniform(-900, -720))
    hu["bone"], hu["spongy"] = float(rng.uniform(220, 480)), float(rng.uniform(100, 240))
    hu["bile"] = float(rng.choice([rng.uniform(-2, 25), rng.uniform(20, 110)], p=[0.85, 0.15]))
    return hu


def draw_body(rng: np.random.Generator) -> tuple[Patient, float, np.ndarray]:
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
    return Patient(np.vstack(bend), behind, layers, front, skin), skin, points[depth < 0]


# ---------------------------------------------------------------------------------------------
# the scan
# ---------------------------------------------------------------------------------------------


def draw_grid(rng: np.random.Generator, config: Config, skin: float):
    """Shape (Z, Y, X) and the affine from voxels (X, Y, Z) to reference mm of one random scan."""
    scale = rng.uniform(0.86, 1.12) * rng.uniform((0.94, 0.86, 0.8), (1.08, 1.18, 1.08))
    width, depth = (
        (2 * (half + skin)) * s for half, s in ((HALF_WIDTH, scale[0]), (105, scale[1]))
    )
    margin = rng.uniform(-50, -10) if rng.random() < 0.12 else rng.uniform(0, 60)  # cut, or air
    top, bottom = rng.uniform(5, 170), rng.uniform(-420, -190)
    if rng.random() < 0.12:
        top = rng.uniform(-60, 5)
    if rng.random() < 0.15:
        bottom = rng.uniform(-190, -110)
    mm = np.array([width + margin, depth + margin + 20, (top - bottom) * scale[2]])
    shape = np.maximum(np.round(mm / config.spacing), 16).astype(int)
    middle = np.array([*rng.uniform(-8, 8, 2), (top + bottom) / 2 * scale[2]])
    turn = Rotation.from_rotvec(np.deg2rad(rng.normal(0, (4, 4, 6)))).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(config.spacing)
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    return tuple(shape[::-1].tolist()), np.diag([*(1 / scale), 1]) @ affine


def scan(rng: np.random.Generator, patient: Patient, shape, to_reference: np.ndarray):
    """Image int16 and label uint8, (Z, Y, X): painted, uneven, blurred and noisy."""
    hu, label = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    depth, place = max(1, 2**18 // (shape[1] * shape[2])), np.eye(4)
    for first in range(0, shape[0], depth):
        slab = slice(first, min(first + depth, shape[0]))
        place[2, 3] = first
        canvas = Canvas((slab.stop - first, *shape[1:]), to_reference @ place, patient.bend)
        paint(canvas, patient, "liver", None)
        hu[slab], label[slab] = canvas.hu, canvas.label
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
    return np.maximum(np.rint(hu), AIR - 24).astype(np.int16), label


def make_body(index: int, config: Config) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Image (int16 HU) and label (uint8) of body `index`, (X, Y, Z); they depend on (seed, index)
    and on the spacing alone."""
    rng = np.random.default_rng([config.seed, index])
    patient, skin, _ = draw_body(rng)
    shape, to_reference = draw_grid(rng, config, skin)
    affine = np.diag([*config.spacing, 1.0])
    image, label = scan(rng, patient, shape, to_reference)
    return (
        nib.Nifti1Image(image.T, affine, dtype=image.dtype),
        nib.Nifti1Image(label.T, affine, dtype=label.dtype),
    )


def write_body(index: int, config: Config) -> None:
    name = f"body_{index:04d}.nii.gz"
    for folder, image in zip(("imagesTr", "labelsTr"), make_body(index, config), strict=True):
        path = config.destination / folder / name
        image.header.set_xyzt_units("mm")
        with path.open("wb") as raw, igzip.IGzipFile("", "wb", 1, raw, mtime=0) as stream:
            image.to_stream(stream)


def main(config: Config) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (config.destination / folder).mkdir(parents=True, exist_ok=True)
    indices = range(config.first, config.first + config.cases)
    job = partial(write_body, config=config)
    if config.workers > 1:
        with multiprocessing.get_context("spawn").Pool(config.workers) as pool:
            list(tqdm(pool.imap_unordered(job, indices), "bodies", len(indices), disable=None))
    else:
        list(tqdm(map(job, indices), "bodies", len(indices), disable=None))
    record = {
        "name": "Bodies",
        "description": "Synthetic abdominal CT of no patient, made by make_bodies.py",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
    }
    (config.destination / "dataset.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"make_bodies: {error}")
