"""Our own JSON, damaged byte by byte or entry by entry: whoever reads it goes on or refuses it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attack_bytes import mutate
from attempts import Attempt, Config, Demo, Outcome, build_demo, judge_refusal, try_forked

import apply_model
import prepare
import train
from data.datasets import find_scans
from data.evaluate import is_finished, report_all
from data.files import find_checkpoint, lock_folder, read_json
from data.labels import as_labels, read_description, resolve_classes
from data.splits import read_patients, read_prepared, read_split
from prepare import claim_destination
from preprocess import subvolume_items
from utilities import load_checkpoint
from visualize_3d import Config as View
from visualize_3d import find_case

ODD = (None, True, -1, 0, 1.5, 1e400, 10**30, "", "x", "../x", [], {}, [None], {"x": 1}, ["x"] * 3)


@dataclass(frozen=True)
class Target:
    """A file, and what reads it; the folder is a copy, which may be spoilt."""

    name: str
    path: Path
    read: Callable[[], Any]
    count: int = 30  # attempts of the quick form


def change_entry(content: Any, rng: random.Random) -> str:
    """Replace, remove or double one entry of nested content, in place; what was done."""
    where, holder = [], content
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        where.append(key)
        inner = holder[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
            break
        holder = inner
    kind = rng.choice(["replace", "replace", "replace", "remove", "nest"])
    odd = rng.choice(ODD)
    if kind == "remove":
        del holder[key]
    else:
        holder[key] = copy.deepcopy(odd) if kind == "replace" else [inner]
    return f"{kind} {where}" + (f" by {odd!r}" if kind == "replace" else "")


def spoil(path: Path, sound: bytes, rng: random.Random) -> str:
    """Write a damaged version of a JSON or CSV file; what was done."""
    if path.suffix == ".json" and rng.random() < 0.7:
        content = json.loads(sound)
        if rng.random() < 0.1:
            content, told = rng.choice(ODD), "another content"
        else:
            told = change_entry(content, rng)
        path.write_text(json.dumps(content))
        return told
    changed, told = mutate(sound, rng)
    path.write_bytes(changed)
    return told


# ---------------------------------------------------------------------------------------
# Who reads what
# ---------------------------------------------------------------------------------------


def read_for_training(folder: Path) -> None:
    """Everything that train.py asks dataset.json for."""
    prepared = read_prepared(folder)
    config = train.Config(data=folder, run_folder=folder / "none", input_size=(32, 32))
    train.check(config, prepared)
    train.choose_hu_window(config, prepared["settings"].get("modality", "CT"))
    labels = resolve_classes(config.labels, as_labels(prepared["labels"]))
    train.check_splits(prepared, labels, folder)
    train.class_weights(prepared, labels)
    subvolume_items(prepared, folder, "training")


def read_for_applying(folder: Path) -> None:
    for split in ("training", "validation", "test"):
        config = apply_model.Config(split=split, data=folder)
        apply_model.find_cases(config, lambda _: 0)


def prepare_again(demo: Demo) -> None:
    """prepare.py goes on from the records of an earlier run."""
    prepare.main(prepare.Config(source=demo.raw, destination=demo.prepared, workers=1))


def report_again(results: Path, case: str) -> None:
    """apply_model.py and visualize_3d.py meet the record of a finished case."""
    is_finished(results / case / f"{case}.json", "0" * 64)
    report_all(results, ["liver"], read_json(next(results.glob("*/*.json")))["weights"])
    find_case(results / case, View())


def hold_lock(folder: Path) -> None:
    with lock_folder(folder):
        pass


def list_targets(demo: Demo) -> Iterator[Target]:
    """Each kind of record of ours, and descriptions that others write."""
    data, raw = demo.prepared, demo.raw
    case = min(path.name for path in (data / "subvolumes").iterdir())
    dataset = data / "dataset.json"
    yield Target("dataset.json, training", dataset, lambda: read_for_training(data))
    yield Target("dataset.json, applying", dataset, lambda: read_for_applying(data))
    of_case = data / "subvolumes" / case / "case.json"
    yield Target("case.json", of_case, lambda: prepare_again(demo), 10)
    yield Target("check's record", data / "check" / f"{case}.json", lambda: prepare_again(demo), 10)
    mark = data / "check" / ".source.json"
    yield Target("source's record", mark, lambda: claim_destination(data, raw, False))
    record = demo.results / case / f"{case}.json"
    yield Target("result's record", record, lambda: report_again(demo.results, case), 15)
    lock = data / ".lock"
    lock.write_text(json.dumps({"pid": 1, "started": 0.0, "host": "another"}))
    yield Target("lock", lock, lambda: hold_lock(data))
    lock.unlink()
    described = raw / "dataset.json"
    yield Target("description", described, lambda: read_description(described))
    split = demo.folder / "split.json"
    names = [path.name.removesuffix(".nii.gz") for path in find_scans(raw / "imagesTr")]
    split.write_text(json.dumps({"training": names[:4], "validation": names[4:], "test": []}))
    yield Target("split", split, lambda: read_split(split, names))
    patients = demo.folder / "patients.csv"
    patients.write_text("case,patient\n" + "".join(f"{name},{name[-1]}\n" for name in names))
    yield Target("patients", patients, lambda: read_patients(patients))


def attack_json(work: Path, config: Config) -> Iterator[Attempt]:
    """Damaged records of ours, of other programs, and settings of a checkpoint."""
    sound = build_demo(config)
    shutil.copytree(sound.folder, work / "demo")
    demo = Demo(work / "demo")
    again = prepare.Config(source=demo.raw, destination=demo.prepared, workers=1, overwrite=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.main(again)
    for target in list_targets(demo):
        content = target.path.read_bytes()

        def attempt(index: int, target=target, content=content) -> Outcome:
            told = spoil(
                target.path, content, random.Random(f"{config.seed} {target.name} {index}")
            )
            outcome, detail = judge_refusal(target.read)
            return outcome, f"number {index} ({told}) {detail}"

        yield from try_forked(
            f"JSON: {target.name}", target.count if config.quick else 8 * target.count, attempt
        )
        target.path.write_bytes(content)
    yield from attack_checkpoint(demo, config)


def attack_checkpoint(demo: Demo, config: Config) -> Iterator[Attempt]:
    """A checkpoint that is whole, but of whose settings one is odd: applied, and resumed."""
    path = demo.run / "last.pt"
    saved = torch.load(path, weights_only=True)
    kept = ("config", "preprocessing", "inference", "network_args", "declared", "modality",
            "history", "epoch", "val_dice", "schema")  # fmt: skip

    def attempt(index: int) -> Outcome:
        rng, changed = random.Random(f"{config.seed} checkpoint {index}"), dict(saved)
        settings = copy.deepcopy({key: saved[key] for key in kept})
        told = change_entry(settings, rng)
        for key in kept:
            changed.pop(key)
        torch.save(changed | settings, path)
        outcome, detail = judge_refusal(lambda: use_checkpoint(path))
        return outcome, f"number {index} ({told}) {detail}"

    yield from try_forked("checkpoint's settings", 20 if config.quick else 200, attempt)
    torch.save(saved, path)


def use_checkpoint(path: Path) -> None:
    """All that apply_model.py and train.py --resume ask of it before the network runs."""
    apply_model.load_model(path, "cpu")
    folder = path.parent
    again = train.Config(resume=folder, max_epochs=2)
    saved = load_checkpoint(find_checkpoint(folder, ["last.pt"]))
    train.is_finished(train.resume_settings(again, folder, saved), saved)
