"""What a network makes of real CTs that are worse than those it is used to: the robustness card.

    python benchmarks/robustness.py --work data/robustness
    python benchmarks/robustness.py --name rotation --networks a/last.pt b/last.pt c/last.pt \\
        --held-out "ircad_01 tace_0697" "ircad_17 tace_1720" "ircad_19 tace_2022"

Six real CTs, every second pixel of each slice, are harmed in one way at a time
(`benchmarks/harms.py`) and segmented by a network that never saw the patient: the starter weights,
or of several networks the one whose `--held-out` names the patient. Every scan that is done is kept
in `WORK/NAME.json`, so that the same command goes on.
Writes an entry of benchmarks/results/robustness.json and docs/pictures/robustness.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from harms import harm
from machine import DATA, RESULTS, ROOT, machine, name_command
from trust import GOOD, judge_case, score

from apply_model import load_model
from data.files import read_json, write_json
from data.labels import USUAL_LABELS
from data.pictures import save_figure
from data.scans import read_label_map, read_scan
from data.volumes import Volume

ROWS = {  # row of the card → harm, strength
    "as it is": ("as it is", 0),
    "slices 2 times as thick": ("thick slices", 2),
    "slices 4 times as thick": ("thick slices", 4),
    "noise, SD 100 HU": ("noise", 100),
    "40 HU brighter": ("HU shifted", 40),
    "40 HU darker": ("HU shifted", -40),
    "soft-tissue contrast × 0.6": ("contrast", 0.6),
    "half of the liver's slices": ("cropped z", 0.5),
    "field of view × 0.7": ("cropped view", 0.7),
    "turned by 10°": ("turned", 10),
    "arms' streaks, SD 40 HU": ("streaks", 40),
    "other orientation": ("other orientation", 0),
}
EVERY = 2  # pixel of a slice is kept


@dataclass
class Config:
    """Networks, patients and where the rows are kept."""

    work: Path = Path("data/robustness")  # relative: below the project
    name: str = "starter"  # of the entry
    networks: tuple[Path, ...] = (Path("checkpoints/starter.pt"),)
    rows: tuple[str, ...] = tuple(ROWS)  # of the card
    held_out: tuple[str, ...] = ()  # of each network, patients it never saw; none: of all


def open_real(name: str) -> tuple[Volume, np.ndarray]:
    """A real CT (RAS, HU as float32), every second pixel, and its liver with tumours."""
    volume = read_scan(DATA / "ct" / "imagesTr" / f"{name}.nii.gz")
    label = read_label_map(DATA / "ct" / "labelsTr" / f"{name}.nii.gz", volume, USUAL_LABELS)
    box = (slice(None, None, EVERY), slice(None, None, EVERY), slice(None))
    scan = Volume(volume.ras.data.astype(np.float32), volume.ras_affine).crop(box)
    return scan, (label.ras.data > 0)[box].astype(np.uint8)


def collect(config: Config) -> dict[str, dict[str, dict[str, Any]]]:
    """Row of the card → patient → figures; what an earlier call has done is not done again."""
    path = ROOT / config.work / f"{config.name}.json"
    done = read_json(path) if path.exists() else {}
    models = [load_model(network, "cpu", "fp32") for network in config.networks]
    files = (DATA / "ct" / "imagesTr").glob("[!.]*.nii.gz")
    patients = sorted(file.name.removesuffix(".nii.gz") for file in files)
    unseen = [names.split() for names in config.held_out] or [patients]
    for title in config.rows:
        name, strength = ROWS[title]
        for index, patient in enumerate(patients):
            if patient in done.setdefault(title, {}):
                continue
            model = next(m for m, names in zip(models, unseen, strict=True) if patient in names)
            rng = np.random.default_rng([index, *title.encode()])
            scan, label = harm(*open_real(patient), name, strength, rng)
            done[title][patient] = judge_case(model, scan, label)
            write_json(done, path)
            print(title, patient, done[title][patient], flush=True)
    return {title: done[title] for title in ROWS if title in done}


def summarise(done: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean, worst and failures of each row of the card."""
    card = {}
    for title, row in done.items():
        dice = {patient: figures["dice"] for patient, figures in row.items()}
        worst = min(dice, key=lambda patient: dice[patient])
        card[title] = {
            "mean": round(float(np.mean(list(dice.values()))), 3),
            "worst": dice[worst],
            "worst_patient": worst,
            "failures": sum(value < GOOD for value in dice.values()),
            "mean_expected_dice": round(
                float(np.mean([figures["expected_dice"] for figures in row.values()])), 3
            ),
        }
    return card


def score_trust(done: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """How well the expected Dice foretells the true one on these scans, and what it costs."""
    rows = [figures for row in done.values() for figures in row.values()]
    cost = sum(row["seconds_trust"] for row in rows) / sum(row["seconds"] for row in rows)
    expected = np.array([row["expected_dice"] for row in rows])
    return {"percent_of_the_time": round(100 * cost, 2), **score(rows, expected)}


def draw(done: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Heat map of Dice: a row for each harm, a column for each patient."""
    from matplotlib.figure import Figure

    patients = list(next(iter(done.values())))
    table = np.array([[row[patient]["dice"] for patient in patients] for row in done.values()])
    figure = Figure(figsize=(7.6, 0.42 * len(done) + 1.4), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(table, cmap="viridis", vmin=0.5, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(table):
        colour = "black" if value > 0.8 else "white"
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9,
                  weight="bold" if value < GOOD else "normal")  # fmt: skip
    axes.set_xticks(range(len(patients)), patients)
    axes.set_yticks(range(len(done)), list(done))
    axes.set_title(f"liver Dice of patients that the network never saw; bold: below {GOOD}")
    figure.colorbar(shown, ax=axes, extend="min")
    save_figure(figure, path)


def main(config: Config) -> None:
    done = collect(config)
    path = RESULTS / "robustness.json"
    result = read_json(path) if path.exists() else {}
    result[config.name] = {
        "command": name_command(),
        "networks": [str(network) for network in config.networks],
        "n": f"{len(next(iter(done.values())))} real CTs, each unseen by its network",
        "machine": machine(torch_too=True),
        "card": summarise(done),
        "expected_dice": score_trust(done),
        "scans": done,
    }
    write_json(result, path)
    suffix = "" if config.name == "starter" else f"_{config.name}"  # of the picture
    draw(done, ROOT / "docs" / "pictures" / f"robustness{suffix}.png")
    for title, row in result[config.name]["card"].items():
        print(f"| {title} | {row['mean']:.3f} | {row['worst']:.3f} | {row['failures']} |")
    print(result[config.name]["expected_dice"])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
