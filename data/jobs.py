"""What apply_model.py is asked to do: its cases, and what their results depend on.

`config` is apply_model.py's: it names scans and truths, or a split of prepared data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cases import find_scans, hash_inputs
from data.descriptions import Description, read_prepared
from data.evaluate import describe_truths, pair_truths
from data.files import InputError
from data.labels import IMAGE, LABEL, as_labels
from data.masks import Masks, restore_label
from data.names import make_safe, name_case, name_scans
from data.splits import choose_fold

CHANGING = (  # settings that change a result
    "background", "trim_by_hu", "largest_component", "fill_holes", "tumour_inside", "mirror",
    "probability", "precision", "dicom_seg", "overlap", "locate",
)  # fmt: skip


@dataclass
class Case:
    """A scan to segment, its truth, and what its data set says about both."""

    name: str
    image: Path
    label: Path | Masks | None = None
    described: Description | None = None  # what the truth's values mean, if its data say so
    trust_grid: bool = False  # prepare.py laid the truth voxel on voxel
    modality: str = ""
    warnings: tuple[str, ...] = ()  # what prepare.py told of it, accepted findings too
    accepted: tuple[str, ...] = ()  # kinds of findings that prepare.py was told to accept
    drawn: tuple[int, int] = (0, 1)  # a slice (RAS) of the truth that was drawn; every n-th was
    alone: bool = True  # no other case beside it


def find_cases(config: Any, read_fold: Callable[[Path], int]) -> list[Case]:
    """Everything that was asked for, each under a name of its own.

    `read_fold` tells of a checkpoint which fold its training left out.
    """
    if config.split:
        return find_prepared(config, read_fold)
    if not config.paths:
        raise InputError("nothing to segment: give CT volumes, or --split test")
    scans = [scan for path in config.paths for scan in find_scans(path)]
    if twice := [scan for scan, n in Counter(map(os.path.realpath, scans)).items() if n > 1]:
        name = name_case(Path(twice[0]))
        raise InputError(f"two volumes are called {name}: {twice[0]} is given twice")
    names = name_scans(scans, config.paths[0] if len(config.paths) == 1 else None)
    cases = zip(names, scans, pair_truths(scans, config.truth), strict=True)
    return [Case(*case, alone=len(scans) == 1) for case in cases]


def find_prepared(config: Any, read_fold: Callable[[Path], int]) -> list[Case]:
    """The cases of one split of prepared data, with what prepare.py was told about them."""
    prepared, path = read_prepared(config.data), config.data / "dataset.json"
    if (settings := prepared["settings"]).get("folds"):  # the network knows which it has not seen
        prepared = choose_fold(prepared, read_fold(config.checkpoint), config.data)
    try:
        described = Description(as_labels(prepared["labels"]), tuple(prepared.get("ignore", ())))
        chosen = [record for record in prepared["cases"] if record["split"] == config.split]
        cases = [
            Case(
                record["case"], Path(record[IMAGE]), restore_label(record[LABEL]), described,
                bool(settings.get("trust_image_grid")), settings.get("modality") or "",
                tuple(record.get("warnings", ())),
                tuple(record.get("accepted", settings.get("accept") or ())),
                (int(record.get("drawn_slice", 0)), int(settings.get("label_every") or 1)),
                len(chosen) == 1,
            )
            for record in chosen
        ]  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: must be as prepare.py writes it, got {error!r}; prepare the data again"
        ) from error
    if not cases:
        raise InputError(f"{path}: no case in the {config.split} split; choose another split")
    if odd := [case.name for case in cases if make_safe(case.name) != case.name]:
        raise InputError(f"{path}: {odd[0]!r} is no case name; prepare the data again")
    return cases


def fingerprint(case: Case, weights: str, config: Any) -> str:
    """Changes whenever the scan, its truth, the networks or a setting of the result change."""
    settings = [getattr(config, key) for key in CHANGING]
    settings += [case.trust_grid, case.accepted, case.drawn]
    meant = case.described or (case.label and describe_truths(case.label))
    settings.append(meant and [meant.labels, meant.ignore])
    inputs = [hash_inputs([path]) if path else None for path in (case.image, case.label)]
    return hashlib.sha256(json.dumps([inputs, weights, settings]).encode()).hexdigest()
