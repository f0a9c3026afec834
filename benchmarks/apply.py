"""Time, memory and arithmetic of apply_model.py on one large scan, and of its evaluation.

    python benchmarks/apply.py --livers ../shared/data/lits_labels

A CT painted around a LiTS liver mask on its own grid, cut to 512 × 512 × 450, is segmented by an
oracle that knows the liver, so that what is left is everything but the network: reading,
preprocessing, the way back to the scan's grid, post-processing, writing, preview. The true mask
against itself, moved, gives the evaluation's time on 512 × 512 × 300.
The same is measured of an earlier commit, checked out beside this one (`--before`), in turns with
it, in CPU seconds of one thread, which other programs on the machine disturb least: the ratios.
Arithmetic is counted by torch on the real network, without running it. Writes
benchmarks/results/apply.json. Parts of their own, each kept beside what the file holds:

    --part round_trip                   what a perfect network loses on the way to its grid and back
    --part command --checkpoint X.pt    the whole command of both commits, start of Python included
    --part located                      what --locate asks of a network that finds the liver
    --part processes --checkpoint X.pt  six real CTs by two processes of one thread, by one of two
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import torch
import tyro
from machine import DATA, RESULTS, ROOT, machine, name_command, peak_mb
from monai.data.utils import dense_patch_slices
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import apply_model
import preprocess
import utilities
from data.evaluate import evaluate
from data.files import read_json, write_json
from data.labels import LABEL, USUAL_LABELS, index_classes
from data.volumes import Volume, list_slabs, name_case, read_file


@dataclass
class Config:
    livers: Path = DATA / "lits_labels"  # liver masks to paint around
    mask: int = 11  # index of the mask, 512 × 512 × 466
    work: Path = Path("/tmp/apply_benchmark")  # folder for the scan and the results
    results: Path = RESULTS / "apply.json"  # JSON to write
    repeats: int = 3  # runs; the median counts
    every: int = 1  # of the LiTS masks in the round trip each such one
    before: str = "13f3dc4"  # commit to compare with; empty: none
    network: bool = True  # also time windows of the network of the defaults
    checkpoint: Path | None = None  # of a trained network, for the parts that need one
    # Ways to call apply_model.py of this commit, each in quotes, in the part "command".
    options: tuple[str, ...] = ("", "--locate")
    part: str = ""  # one alone, or internal: what a process of its own measures


SETTINGS = {
    "sampling": "subvolumes",
    "spacing": (1.0, 1.0),
    "hu_window": (-200.0, 250.0),
    "input_size": (256, 256),
    "labels": {"background": (0,), "liver": (1, 2)},
    "ignore": (),
    "crop_to_body": False,
}
KNOWN = {item.name for item in fields(preprocess.Chain)}  # an earlier commit may lack some
CHAIN = preprocess.Chain(**{key: value for key, value in SETTINGS.items() if key in KNOWN})
INFERENCE = {"window": (256, 256, 16), "overlap": 0.5}


def as_ct(label: Volume) -> Volume:
    """Foreground as bright as the HU window's upper end, the rest as dark as its lower one."""
    return label.like(np.where(label.read() > 0, np.int16(250), np.int16(-200)))


class Oracle(torch.nn.Module):
    """Costs next to nothing: answers window after window with the true liver, a little too large.

    What follows then has a liver to work on, as after training. With `network`, that one runs too
    on the first two windows, for its time and memory alone: the others take the same.
    """

    def __init__(self, truth: Volume, network: torch.nn.Module | None = None):
        super().__init__()
        self.network, self.seconds = network, 0.0
        self.scores = preprocess.preprocess_volume(as_ct(truth), CHAIN, "cpu")[0].half()
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
        folder = config.work / "raw"
        bodies.main(bodies.Config(folder, 1, config.mask, livers=config.livers))
        for path in paths:
            whole = read_file(path)
            part = Volume(whole.read()[:, :, :450], whole.affine, header=whole.header)
            part.write(path)
    return paths[0], paths[1]


def unet() -> torch.nn.Module:
    """The network of the defaults, untrained."""
    return utilities.build_network(
        "unet3d", in_channels=1, out_channels=2, base_channels=32, input_size=(256, 256, 16)
    )


def whole_case(config: Config, network: torch.nn.Module | None = None) -> dict:
    """One scan with its truth through all that `apply_to_case` does."""
    scan, truth = paint(config)
    oracle, cpu = Oracle(read_file(truth), network), torch.device("cpu")
    precision = utilities.pick_precision("auto", cpu)
    model = apply_model.Model(oracle.eval(), CHAIN, INFERENCE, cpu, precision)
    job = apply_model.Config(destination=config.work / "results")
    case = apply_model.Case("large", scan, truth)
    start = time.perf_counter()
    row = apply_model.apply_to_case(model, case, job)
    total = time.perf_counter() - start
    stages = {k: v for k, v in row.items() if k.startswith("seconds_")}
    rest = total - row["seconds_network"] - row["seconds_evaluate"]
    return {
        "shape": list(read_file(scan).shape),
        "all_but_network_and_evaluation_s": round(rest, 2),
        "evaluation_s": row["seconds_evaluate"],
        "stages": stages,
        "peak_mb": peak_mb(),
        "seconds_per_window": round(oracle.seconds, 2),
    }


def evaluation(config: Config) -> dict:
    """All figures of a 512 × 512 × 300 pair: the true mask against itself moved by 2 voxels."""
    label = read_file(paint(config)[1])
    array = label.read()
    last = int(np.flatnonzero(array.any(axis=(0, 1))).max()) + 10
    first = max(0, min(last, array.shape[2]) - 300)
    classes = index_classes(array[:, :, first : first + 300], USUAL_LABELS)
    truth = Volume(classes, label.affine)
    moved = truth.like(np.roll(classes, (2, 2, 1), axis=(0, 1, 2)))
    before, start = peak_mb(), time.perf_counter()
    row = evaluate(moved, truth, ["liver", "tumour"])
    return {
        "shape": list(truth.shape),
        "evaluation_s": round(time.perf_counter() - start, 2),
        "liver_voxels": int(np.count_nonzero(classes)),
        "liver_dice": round(row["liver_dice"], 4),
        "peak_mb_more": peak_mb() - before,
    }


# ---------------------------------------------------------------------------------------
# What a perfect network loses
# ---------------------------------------------------------------------------------------


def there_and_back(slab: Volume, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A liver label in RAS order to `size` × `size` pixels in plane and back: two masks.

    "hard" takes the label's path through the chain, as in training: the classes that a network is
    taught, so that no network can be better taught than this. "soft" takes the image's path, whose
    blurred edges carry where between two pixels the border runs: a network with ideal logits.
    """
    chain = preprocess.Chain(**{**vars(CHAIN), "input_size": (size, size)})
    soft, to_network = preprocess.preprocess_volume(as_ct(slab), chain, "cpu")
    how = (slab.read(), slab.spacing_mm, chain, "cpu", LABEL)
    slices = preprocess.preprocess_slices(*how).as_tensor()
    hard = slices.permute(1, 2, 0)[None]
    soft_back, hard_back = (
        preprocess.classes_on_grid(2 * mask.float() - 1, to_network, slab.shape) > 0
        for mask in (soft, hard)
    )
    return hard_back, soft_back


def label_dice(path: Path, size: int) -> dict[str, float]:
    """Liver Dice of `there_and_back` for a whole label map, on its own grid; no post-processing."""
    label = read_file(path)
    counts = {"hard": np.zeros(2), "soft": np.zeros(2)}
    for _, array in label.slabs(list_slabs(label.ras_shape[2], 32)):
        if array.any():  # slices without liver come back without
            truth, slab = array > 0, Volume(array, label.ras_affine)
            for kind, found in zip(counts, there_and_back(slab, size), strict=True):
                both, either = np.count_nonzero(found & truth), found.sum() + truth.sum()
                counts[kind] += 2 * both, either
    return {kind: float(both / either) for kind, (both, either) in counts.items()}


def describe_dice(paths: Sequence[Path], size: int, title: str) -> dict[str, Any]:
    """Mean, worst and each case's Dice of both ways, for some label maps."""
    dice = {name_case(path): label_dice(path, size) for path in tqdm(paths, desc=title)}
    part: dict[str, Any] = {"n": len(dice)}
    for kind in ("hard", "soft"):
        values = {case: round(each[kind], 4) for case, each in dice.items()}
        worst = min(values, key=lambda case: values[case])
        mean = round(statistics.mean(each[kind] for each in dice.values()), 4)
        part[kind] = {"mean": mean, "worst": values[worst], "worst_case": worst, "each": values}
    return part


def round_trip(config: Config) -> dict:
    """Liver Dice of a perfect network: label maps to the network's grid and back onto their own."""
    lits = sorted(config.livers.glob("*.nii.gz"))[:: config.every]
    real = sorted((config.livers.parent / "ct/labelsTr").glob("*.nii.gz"))
    groups = (("real_ct", 256, real), ("real_ct", 128, real), ("lits", 256, lits))
    parts = {f"{name}_{size}": describe_dice(p, size, f"{name} {size}") for name, size, p in groups}
    about = {
        "command": f"python benchmarks/apply.py --part round_trip --every {config.every}",
        "data": "real_ct: labels of six real CTs, liver and tumour as one; lits: LiTS liver masks",
        "meaning": "hard: the label as training has it, back by linear interpolation of ±1; soft: "
        "the mask through the image's path; Dice on the label's own grid, no post-processing",
    }
    keep(config, "round_trip", about | parts)
    return {
        name: {kind: {**part[kind], "each": None} for kind in ("hard", "soft")}
        for name, part in parts.items()
    }


# ---------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------


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
    windows = len(dense_patch_slices((256, 256, shape[2]), (256, 256, 16), (256, 256, 8)))
    patches = len(dense_patch_slices(shape, (128, 128, 128), (64, 64, 64)))
    each, patch = teraflops(unet(), (1, 1, 256, 256, 16)), teraflops(theirs, (1, 1, 128, 128, 128))
    return {
        "ours": {"network_evaluations": windows, "tflop_each": round(each, 3),
                 "tflop": round(windows * each, 1)},
        "nnunet_with_mirroring": {"network_evaluations": 8 * patches, "tflop_each": round(patch, 3),
                                  "tflop": round(8 * patches * patch, 1)},
        "nnunet_without_mirroring": {"network_evaluations": patches,
                                     "tflop": round(patches * patch, 1)},
    }  # fmt: skip


RUN = (  # a script whose stages are told in CPU seconds
    "import runpy, sys, time; time.perf_counter = time.process_time; "
    "sys.argv = sys.argv[1:]; sys.path.insert(0, 'benchmarks'); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def apart(config: Config, part: str, root: Path = ROOT) -> dict:
    """A part in a process of its own, of one thread, so that its peak memory is its own."""
    command = [sys.executable, "-c", RUN, "benchmarks/apply.py", "--part", part, "--mask",
               str(config.mask), "--livers", str(config.livers.resolve()),
               "--work", str(config.work.resolve())]  # fmt: skip
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start_up(root: Path, words: Sequence[str]) -> float:
    """CPU seconds of Python with some words."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *words]
    subprocess.run(command, cwd=root, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextlib.contextmanager
def checked_out(config: Config) -> Iterator[dict[str, Path]]:
    """This code, and beside it that of the earlier commit."""
    if not config.before:
        yield {"now": ROOT}
        return
    beside = config.work / "before"
    add = ["git", "worktree", "add", "--detach", "--force", str(beside), config.before]
    subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
    try:
        yield {"before": beside, "now": ROOT}
    finally:
        remove = ["git", "worktree", "remove", "--force", str(beside)]
        subprocess.run(remove, cwd=ROOT, check=True)


def compare(config: Config) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    """Runs of both, in turns; and of each figure both medians and their ratio."""
    runs: dict[str, list[dict]] = {}
    with checked_out(config) as roots:
        for _ in range(config.repeats):
            for name, root in roots.items():
                run = apart(config, "case", root)
                run["help_s"] = start_up(root, ["apply_model.py", "--help"])
                run["missing_told_s"] = start_up(root, ["apply_model.py", "none.nii.gz"])
                run["imports_s"] = start_up(root, ["-c", "import apply_model"])
                runs.setdefault(name, []).append(run)
    keys = ("all_but_network_and_evaluation_s", "evaluation_s",
            "help_s", "missing_told_s", "imports_s", "peak_mb")  # fmt: skip
    return runs, describe({k: [{x: run[x] for x in keys} for run in r] for k, r in runs.items()})


def keep(config: Config, key: str, found: dict) -> dict:
    """Write what a part found beside what is known; returns it."""
    known = read_json(config.results) if config.results.exists() else {}
    write_json({**known, key: found}, config.results)
    return found


def describe(runs: dict[str, list[dict]]) -> dict[str, Any]:
    """Of each figure of some runs of several kinds the medians, and their ratios to the first's."""
    figures: dict[str, Any] = {}
    for key in next(iter(runs.values()))[0]:
        medians = {kind: statistics.median(run[key] for run in some) for kind, some in runs.items()}
        first, *others = medians
        figures[key] = {kind: round(value, 3) for kind, value in medians.items()}
        for other in others if medians[first] else ():
            figures[key][f"{other} / {first}"] = round(medians[other] / medians[first], 3)
    return figures


def measure_command(root: Path, words: Sequence[str], threads: int = 1, ranks: int = 1) -> dict:
    """Wall and CPU seconds of apply_model.py with some words, in processes that share the scans."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    some = []
    for rank in range(ranks):
        shared = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        alone = os.environ | {"OMP_NUM_THREADS": str(threads)} | shared
        command = [sys.executable, "apply_model.py", *words, "--overwrite"]
        some.append(subprocess.Popen(command, cwd=root, env=alone, stdout=subprocess.DEVNULL))
    if any(process.wait() for process in some):
        raise SystemExit("apply_model.py failed, see above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": round(cpu, 2), "wall_s": round(time.time() - start, 2)}


def whole_command(config: Config) -> dict:
    """apply_model.py on the large scan as a user runs it, of both commits in turns."""
    scan, truth = paint(config)
    results, runs = config.work.resolve() / "command", dict[str, list[dict]]()
    words = [str(scan.resolve()), "--truth", str(truth.resolve()), "--destination", str(results),
             "--checkpoint", str(config.checkpoint.resolve()), "--device", "cpu"]  # fmt: skip
    with checked_out(config) as roots:
        ways = {"before": (roots["before"], "")} if "before" in roots else {}
        ways |= {f"now {more}".strip(): (roots["now"], more) for more in config.options}
        for _ in range(config.repeats):
            for way, (root, more) in ways.items():
                run = measure_command(root, [*words, *more.split()])
                (row,) = read_json(results / "results.json")
                run |= {"liver_dice": row["liver_dice"], "windows": row["network_windows"]}
                runs.setdefault(way, []).append(run | {"network_s": row["seconds_network"]})
    network = torch.load(config.checkpoint, weights_only=True)["network_args"]
    about = {"command": name_command(), "network": network, "before": config.before}
    found = {**about, **describe(runs), "runs": runs, "machine": machine()}
    return keep(config, "whole_command", found)


class Knowing(torch.nn.Module):
    """Finds the liver as it is: what it is given has it as second channel.

    The network of the defaults runs too, on the first TIMED windows of each shape, for its time:
    the others take the same.
    """

    TIMED = 2

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.seconds, self.asked = network, {}, Counter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = tuple(x.shape)
        self.asked[shape] += 1
        if len(known := self.seconds.setdefault(shape, [])) < self.TIMED:
            start = time.process_time()
            self.network(x[:, :1])
            known.append(round(time.process_time() - start, 2))
        return torch.cat([0.5 - x[:, 1:], x[:, 1:] - 0.5], dim=1)

    def add_up(self) -> float:
        """CPU seconds of all that was asked since the last time."""
        mean = {shape: statistics.mean(known) for shape, known in self.seconds.items()}
        total = sum(mean[shape] * count for shape, count in self.asked.items())
        self.asked.clear()
        return round(total, 1)


def located(config: Config) -> dict:
    """What `--locate` asks of the network of the defaults, if that finds the liver as it is, and
    the CPU seconds of it, beside those of all windows; one thread."""
    torch.set_num_threads(1)
    scan, truth = (read_file(path) for path in paint(config))
    volume, to_network = preprocess.preprocess_volume(scan, CHAIN, "cpu")
    liver, _ = preprocess.preprocess_volume(as_ct(truth), CHAIN, "cpu")
    cpu, grain = torch.device("cpu"), utilities.GRAINS["unet3d"]
    knowing = Knowing(unet().eval().to(memory_format=torch.channels_last_3d))
    precision = utilities.pick_precision("auto", cpu)
    model = apply_model.Model(knowing, CHAIN, INFERENCE, cpu, precision, grain=grain)
    look, both, seconds = apply_model.open_look(model, scan, to_network), [volume, liver], []
    for asked in (None, look):
        scores = apply_model.predict(model, torch.cat(both), look=asked)
        seconds.append(knowing.add_up())
    missed = int(((scores[0] <= 0) & (liver[0] > 0.5)).sum())
    row = look.describe(to_network, scan.ras_shape) | {"liver_voxels_missed": missed}
    row |= {"network_cpu_s": {"all windows": seconds[0], "located": seconds[1]},
            "ratio": round(seconds[1] / seconds[0], 3)}  # fmt: skip
    row["seconds_of_a_window"] = {"x".join(map(str, k[2:])): v for k, v in knowing.seconds.items()}
    n = f"1 scan; of each shape of window {Knowing.TIMED} timed"
    about = {"command": name_command(), "n": n, "precision": str(precision)}
    meaning = "network_share: of all windows' voxels, those that were asked"
    about |= {"meaning": meaning, "machine": machine()}
    return keep(config, "located", {**about, **row})


def processes(config: Config) -> dict:
    """All six real CTs by one process of two threads, and by two of one, in turns."""
    results, ways = config.work.resolve() / "processes", {"one of two threads": (2, 1)}
    ways["two of one thread"] = (1, 2)
    words = [str(DATA / "ct" / "imagesTr"), "--destination", str(results), "--device", "cpu",
             "--checkpoint", str(config.checkpoint.resolve())]  # fmt: skip
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for _ in range(config.repeats):
        for way, (threads, ranks) in ways.items():
            runs[way].append(measure_command(ROOT, words, threads, ranks))
    about = {"command": name_command(), "load": os.getloadavg()[0], "machine": machine()}
    return keep(config, "processes", {**about, **describe(runs), "runs": runs})


PARTS = {
    "case": whole_case,
    "evaluation": evaluation,
    "round_trip": round_trip,
    "command": whole_command,
    "located": located,
    "processes": processes,
    "network": lambda config: whole_case(
        config, unet().eval().to(memory_format=torch.channels_last_3d)
    ),
}


def main(config: Config) -> None:
    if config.part:
        print(json.dumps(PARTS[config.part](config)))
        return
    paint(config)
    runs, figures = compare(config)
    about = {
        "command": name_command(),
        "data": f"CT painted around LiTS mask {config.mask}, cut to 512x512x450, int16 .nii.gz; "
        "evaluation: 300 slices of its label map, liver and tumour, moved by 2, 2, 1 voxels",
        "n": f"{config.repeats} runs of 1 scan, in turns; medians of CPU seconds, one thread",
        "before": config.before,
        "machine": machine(),
    }
    found = {"figures": figures, "arithmetic": arithmetic((512, 512, 450))}
    known = read_json(config.results) if config.results.exists() else {}
    if config.network:
        found["with_network"] = apart(config, "network")
    write_json({**known, **about, **found, "runs": runs}, config.results)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
