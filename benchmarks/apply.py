"""Time, memory and arithmetic of apply_model.py on one large scan, and of its evaluation.

    python benchmarks/apply.py --livers ../shared/data/lits_labels

A CT painted around a LiTS liver mask on its own grid, cut to 512 × 512 × 450, is segmented by an
oracle that knows the liver, so that what is left is everything but the network: reading,
preprocessing, the way back to the scan's grid, post-processing, writing, preview. The true mask
against itself, moved, gives the evaluation's time on 512 × 512 × 300.
Arithmetic is counted by torch on the real network, without running it. `--part round_trip` measures
what a perfect network loses on the way to its grid and back. Writes benchmarks/results/apply.json.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "benchmarks")]

import make_phantoms  # noqa: E402
import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from monai.data import MetaTensor  # noqa: E402
from monai.transforms import Compose  # noqa: E402
from prepare_lits import machine  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

import apply_model  # noqa: E402
import preprocess  # noqa: E402
import utilities  # noqa: E402
from data.files import atomic_write  # noqa: E402
from data.labels import IMAGE, LABEL  # noqa: E402


@dataclass
class Config:
    livers: Path = ROOT.parent / "shared/data/lits_labels"  # liver masks to paint around
    mask: int = 11  # index of the mask, 512 × 512 × 466
    work: Path = Path("/tmp/apply_benchmark")  # folder for the scan and the results
    results: Path = ROOT / "benchmarks/results/apply.json"  # JSON to write
    repeats: int = 3  # runs; the median counts
    every: int = 1  # of the LiTS masks in the round trip each such one
    part: str = ""  # "round_trip" alone, or internal: what a process of its own measures


SETTINGS = {
    "sampling": "subvolumes",
    "spacing": (1.0, 1.0),
    "hu_window": (-200.0, 250.0),
    "input_size": (256, 256),
    "labels": {"background": (0,), "liver": (1, 2)},
}
INFERENCE = {"window": (256, 256, 16), "overlap": 0.5}


class Oracle(torch.nn.Module):
    """Costs next to nothing: answers window after window with the true liver, a little too large.

    What follows then has a liver to work on, as after training. With `network`, that one runs too
    on the first two windows, for its time and memory alone: the others take the same.
    """

    def __init__(self, truth: nib.Nifti1Image, network: torch.nn.Module | None = None):
        super().__init__()
        self.network, self.seconds = network, 0.0
        array = utilities.voxels(truth)
        as_ct = utilities.like(truth, np.where(array > 0, 250, -200).astype(np.int16))
        self.scores = preprocess.preprocess_volume(as_ct, **SETTINGS, device="cpu")[0].half()
        depth, self.next = self.scores.shape[3], 0
        self.starts = [min(start, depth - 16) for start in range(0, depth - 8, 8)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.network is not None and self.next < 2:
            start = time.perf_counter()
            self.network(x)
            self.seconds = time.perf_counter() - start
        starts = self.starts[self.next : self.next + len(x)]
        self.next += len(x)
        inside = torch.stack([self.scores[..., start : start + 16].float() for start in starts])
        return torch.cat([0.4 - inside, inside - 0.4], dim=1)


def paint(config: Config) -> tuple[Path, Path]:
    """The scan and its label map, 512 × 512 × 450; made once."""
    name = f"liver_{config.mask:03d}.nii.gz"
    paths = [config.work / "raw" / folder / name for folder in ("imagesTr", "labelsTr")]
    if not all(path.exists() for path in paths):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        job = make_phantoms.Config(
            destination=config.work / "raw", livers=config.livers, first=config.mask, cases=1
        )
        make_phantoms.write_case(config.mask, job)
        for path in paths:
            image = utilities.read_volume(path)
            image = utilities.like(image, utilities.voxels(image))
            utilities.write_volume(image.slicer[:, :, :450], path)
    return paths[0], paths[1]


def peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def unet() -> torch.nn.Module:
    """The network of the defaults, untrained."""
    return utilities.build_network(
        "unet3d", in_channels=1, out_channels=2, base_channels=32, input_size=(256, 256, 16)
    )


def whole_case(config: Config, network: torch.nn.Module | None = None) -> dict:
    """One scan with its truth through all that `apply_to_case` does."""
    scan, truth = paint(config)
    oracle, cpu = Oracle(utilities.read_volume(truth), network), torch.device("cpu")
    precision = utilities.pick_precision("auto", cpu)
    model = apply_model.Model(oracle.eval(), SETTINGS, INFERENCE, cpu, precision)
    job = apply_model.Config(destination=config.work / "results")
    case = {"case": "large", IMAGE: scan, LABEL: truth}
    start = time.perf_counter()
    row = apply_model.apply_to_case(model, case, job)
    total = time.perf_counter() - start
    stages = {k: v for k, v in row.items() if k.startswith("seconds_")}
    rest = total - row["seconds_network"] - row["seconds_evaluate"]
    return {
        "shape": list(nib.load(scan).shape),
        "all_but_network_and_evaluation_s": round(rest, 2),
        "evaluation_s": row["seconds_evaluate"],
        "stages": stages,
        "peak_mb": peak_mb(),
        "seconds_per_window": round(oracle.seconds, 2),
    }


def evaluation(config: Config) -> dict:
    """All figures of a 512 × 512 × 300 pair: the true mask against itself moved by 2 voxels."""
    _, path = paint(config)
    label = utilities.read_volume(path)
    array = utilities.voxels(label)
    last = int(np.flatnonzero(array.any(axis=(0, 1))).max()) + 10
    labels = {"background": (0,), "liver": (1,), "tumour": (2,)}
    first = max(0, min(last, array.shape[2]) - 300)
    truth = apply_model.class_indices(array[:, :, first : first + 300], labels)
    moved = np.roll(truth, (2, 2, 1), axis=(0, 1, 2))
    before, start = peak_mb(), time.perf_counter()
    row = apply_model.evaluate(moved, truth, label.affine, ["liver", "tumour"])
    return {
        "shape": list(truth.shape),
        "evaluation_s": round(time.perf_counter() - start, 2),
        "liver_voxels": int(np.count_nonzero(truth)),
        "liver_dice": round(row["liver_dice"], 4),
        "peak_mb_more": peak_mb() - before,
    }


def there_and_back(
    slab: np.ndarray, affine: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A liver label (X, Y, Z) in RAS order to `size` × `size` pixels in plane and back: two masks.

    "hard" takes the label's path through the chain, as in training: the classes that a network is
    taught, so that no network can be better taught than this. "soft" takes the image's path, whose
    blurred edges carry where between two pixels the border runs: a network with ideal logits.
    """
    settings = {**SETTINGS, "input_size": (size, size), "device": "cpu"}
    as_ct = nib.Nifti1Image(np.where(slab > 0, np.int16(250), np.int16(-200)), affine)
    soft, to_network = preprocess.preprocess_volume(as_ct, **settings)
    raw = MetaTensor(torch.from_numpy(slab.astype(np.float32))[None], affine=affine)
    item = {key: raw for key in (IMAGE, LABEL)}
    chain = [*preprocess.in_plane_chain(**settings), *preprocess.slice_chain(**settings)]
    hard = Compose(chain)(item)[LABEL]
    return tuple(
        apply_model.classes_on_grid(2 * mask.float() - 1, to_network, slab.shape) > 0
        for mask in (hard, soft)
    )


def label_dice(path: Path, size: int) -> dict[str, float]:
    """Liver Dice of `there_and_back` for a whole label map, on its own grid; no post-processing."""
    label = utilities.read_volume(path)
    shape, affine = utilities.ras_grid(label)
    counts = {"hard": np.zeros(2), "soft": np.zeros(2)}
    for _, slab in utilities.ras_slabs(label, utilities.ranges(shape[2], 32, False)):
        if slab.any():  # slices without liver come back without
            truth = slab > 0
            for kind, found in zip(counts, there_and_back(slab, affine, size), strict=True):
                both, either = np.count_nonzero(found & truth), found.sum() + truth.sum()
                counts[kind] += 2 * both, either
    return {kind: float(both / either) for kind, (both, either) in counts.items()}


def round_trip(config: Config) -> dict:
    """Liver Dice of a perfect network: label maps to the network's grid and back onto their own."""
    lits = sorted(config.livers.glob("*.nii.gz"))[:: config.every]
    real = sorted((config.livers.parent / "ct/labelsTr").glob("*.nii.gz"))
    result: dict = {
        "command": f"python benchmarks/apply.py --part round_trip --every {config.every}",
        "data": "real_ct: labels of six real CTs, liver and tumour as one; lits: LiTS liver masks",
        "meaning": "hard: the label as training has it, back by linear interpolation of ±1; soft: "
        "the mask through the image's path; Dice on the label's own grid, no post-processing",
    }
    for group, size, paths in (("real_ct", 256, real), ("real_ct", 128, real), ("lits", 256, lits)):
        dice = {utilities.case_name(path): label_dice(path, size)
                for path in tqdm(paths, desc=f"{group} {size}")}  # fmt: skip
        part = result[f"{group}_{size}"] = {"n": len(dice)}
        for kind in ("hard", "soft"):
            values = {case: round(each[kind], 4) for case, each in dice.items()}
            worst = min(values, key=values.get)
            mean = round(statistics.mean(each[kind] for each in dice.values()), 4)
            part[kind] = {"mean": mean, "worst": values[worst], "worst_case": worst, "each": values}
    known = json.loads(config.results.read_text()) if config.results.exists() else {}
    with atomic_write(config.results) as temporary:
        temporary.write_text(json.dumps({**known, "round_trip": result}, indent=1) + "\n")
    return {
        key: {kind: {**part[kind], "each": None} for kind in ("hard", "soft")}
        for key, part in result.items()
        if isinstance(part, dict)
    }


def teraflops(network: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """TFLOP of one forward pass, a multiplication and an addition counting two; nothing is run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta").eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops() / 1e12


def arithmetic(shape: tuple[int, int, int]) -> dict:
    """Network evaluations and TFLOP for a scan, beside nnU-Net's plan for the same voxels.

    nnU-Net 3d_fullres on this task: 128 × 128 × 128 patches (at the spacing of the scan here), half
    a patch apart, each in 8 mirrored versions, a plain U-Net of 30.8 million parameters.
    """
    from monai.networks.nets import DynUNet

    theirs = DynUNet(
        3, 1, 3, [3] * 6, [1, 2, 2, 2, 2, 2], [2] * 5, [32, 64, 128, 256, 320, 320]
    )  # fmt: skip
    windows = apply_model.window_count((256, 256, shape[2]), **INFERENCE)
    patches = apply_model.window_count(shape, (128, 128, 128), 0.5)
    each, patch = teraflops(unet(), (1, 1, 256, 256, 16)), teraflops(theirs, (1, 1, 128, 128, 128))
    return {
        "ours": {"network_evaluations": windows, "tflop_each": round(each, 3),
                 "tflop": round(windows * each, 1)},
        "nnunet_with_mirroring": {"network_evaluations": 8 * patches, "tflop_each": round(patch, 3),
                                  "tflop": round(8 * patches * patch, 1)},
        "nnunet_without_mirroring": {"network_evaluations": patches,
                                     "tflop": round(patches * patch, 1)},
    }  # fmt: skip


def apart(config: Config, part: str, repeats: int) -> list[dict]:
    """Each repeat in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--part", part, "--mask", str(config.mask),
               "--livers", str(config.livers), "--work", str(config.work)]  # fmt: skip
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def main(config: Config) -> None:
    if config.part:
        parts = {
            "case": whole_case,
            "evaluation": evaluation,
            "round_trip": round_trip,
            "network": lambda config: whole_case(
                config, unet().eval().to(memory_format=torch.channels_last_3d)
            ),
        }
        print(json.dumps(parts[config.part](config)))
        return
    paint(config)
    runs = {part: apart(config, part, config.repeats) for part in ("case", "evaluation")}
    runs["network"] = apart(config, "network", 1)

    def median(part: str, key: str) -> float:
        return round(statistics.median(run[key] for run in runs[part]), 2)

    result = {
        "command": "python benchmarks/apply.py --livers ../shared/data/lits_labels",
        "data": "CT painted around LiTS mask 11, cut to 512x512x450, int16 .nii.gz; "
        "evaluation: 300 slices of its label map, liver and tumour, moved by 2, 2, 1 voxels",
        "n": f"{config.repeats} runs of 1 scan, medians; with the network 1 run",
        "machine": machine(),
        "all_but_network_and_evaluation_s": median("case", "all_but_network_and_evaluation_s"),
        "peak_mb_without_network": max(run["peak_mb"] for run in runs["case"]),
        "peak_mb": runs["network"][0]["peak_mb"],
        "network_seconds_per_window": runs["network"][0]["seconds_per_window"],
        "evaluation_512x512x300_s": median("evaluation", "evaluation_s"),
        "arithmetic": arithmetic((512, 512, 450)),
        "runs": runs,
    }
    known = json.loads(config.results.read_text()) if config.results.exists() else {}
    result |= {key: known[key] for key in ("round_trip",) if key in known}
    with atomic_write(config.results) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in list(result)[4:] if key != "runs"}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
