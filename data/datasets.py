"""Recognise a data set on disk: which file is a scan, which its label map, and whose they are.

Words in the names of folders and files say what is a scan (image, ct …) and what a label map
(label, mask …). Without these words, the rest of the path says whose it is: a scan and a label map
with the same rest are a pair. `STEPS` lists all rules, the surest first. Where several fit, the
case has a fault that names their paths; what is left out is reported.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from data.dicom import DicomItem, find_dicom, is_dicom
from data.files import (
    InputError,
    list_below,
    list_plain_files,
    make_safe,
    natural,
    read_json,
    show_path,
)
from data.labels import (
    BACKGROUND,
    SYNONYMS,
    USUAL_LABELS,
    WORD,
    Description,
    Labels,
    Masks,
    common_name,
    describe_labels,
    find_label,
    list_values,
    part_ignored,
    read_description,
)
from data.seg import choose_segment_values
from data.volumes import VOLUME_SUFFIXES, keep_volumes, name_case

# ---------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------

SCAN = {
    "image", "images", "img", "imgs", "volume", "volumes", "vol", "ct", "cts", "scan", "scans",
    "dicom", "imaging", "orig", "original", "input", "inputs",
}  # fmt: skip
LABEL = {
    "label", "labels", "lbl", "labelmap", "labelled", "labeled", "seg", "segs", "segm",
    "segmentation", "segmentations", "segmented", "mask", "masks", "truth", "truths", "ground",
    "groundtruth", "gt", "annot", "annotation", "annotations", "annotated", "outline", "outlines",
    "contour", "contours", "target", "targets", "roi", "rois", "maske", "masken", "masque",
    "masques",
}  # fmt: skip
FILLER = {
    "tr",
    "train",
    "training",
    "anon",
    "patient",
    "nifti",
    "nii",
}  # beside such words: no name
FINAL = {"final", "corrected", "revised", "reviewed", "approved"}  # of two label maps of one scan
DRAFT = {"original", "orig", "draft", "initial", "auto", "automatic", "uncorrected", "predicted"}
TEST = {"test", "testing"}  # cases of a challenge, whose label maps nobody has
NOBODY = {
    "",
    "anonymous",
    "anonymized",
    "anonymised",
    "anon",
    "unknown",
    "none",
    "nobody",
    "patient",
}
SEPARATORS = re.compile(r"[\s_\-.,;()\[\]]+")
# Where a word may begin within a name: imagesTr, CTscan, img0001, 1mask, liverseg.
PLACES = re.compile(
    r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z]{2})(?=[a-z])|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)|(?<=[^\W\d_])"
    r"(?=(?i:labels?|segmentations?|seg|masks?|truth|annotations?|outlines?)(?![^\W\d_]))"
)
TS = re.compile(r"(?:^|[^A-Z])Ts$")  # imagesTs, labelsTs
CHANNEL = re.compile(r"_\d{4}$")  # nnU-Net: x_0000 is the first channel of x

Kind = Literal["scan", "label", ""]


@cache
def read_name(text: str) -> tuple[Kind, tuple[str, ...], frozenset[str]]:
    """Return what a name says (a label map wins over a scan), the words that remain without those
    of the tables, and all its words in small letters."""
    pieces = [PLACES.split(piece) for piece in SEPARATORS.split(text) if piece]
    words = frozenset(word.lower() for piece in pieces for word in piece)
    kind: Kind = "label" if words & LABEL else "scan" if words & SCAN else ""
    known = SCAN | LABEL
    rests = ("".join("_" if w.lower() in known else w for w in piece) for piece in pieces)
    rest = tuple(word for text in rests for word in text.split("_") if word)
    if kind and all(word.lower() in FILLER for word in rest):
        rest = ()
    return kind, rest, words


def spell(text: str) -> str:
    """Return what remains of a name as it is written; a number alone is no name: `volume-3`."""
    kind, rest, _ = read_name(text)
    return "_".join(rest) if kind and not "".join(rest).isdigit() else text


@dataclass(frozen=True, eq=False)
class Item:
    """A file, series, SEG or stack of pictures, and what its path says."""

    path: Path
    kind: Kind
    parts: tuple[str, ...]  # what remains of each folder and of the name: whose it is
    bare: tuple[str, ...]  # of a label map: the same without the words of FINAL and DRAFT
    spelt: tuple[str, ...]  # `parts` as written, for names of cases
    rank: int = 0  # of a label map: 1 final, -1 draft
    by_folder: bool = False  # a folder, not only the name, says label map
    form: Literal["file", "series", "seg", "stack"] = "file"
    dicom: DicomItem | None = None

    @property
    def folders(self) -> list[Path]:
        """The folder that holds its files, and those above it in which it may have a partner."""
        whole = self.form == "series" and self.path.is_dir()
        above = [self.path, *self.path.parents] if whole else list(self.path.parents)
        return above[: {"series": 3, "seg": 2}.get(self.form, 1)]


def read_paths(paths: Sequence[Path], root: Path, kind: Kind = "") -> list[Item]:
    """Return an item for each path by the words of its folders below `root` and of its name.

    `kind` overrules the words. A file only called liver, or tumour with a number, is a label map
    beside one that is called a scan, unless it has a label map of its own name.
    """
    named = [
        (*path.relative_to(root).parts[:-1], name_case(path)) if path != root else ()
        for path in paths
    ]
    silent = _find_silent(named)
    own: dict[str, set[tuple[Path, tuple[str, ...]]]] = {"scan": set(), "label": set(), "": set()}
    for path, names in zip(paths, named, strict=True):
        told, rest, _ = read_name(names[-1] if names else "")
        own[told].add((path.parent, rest))
    beside = {folder for folder, _ in own["scan"]}
    items = []
    for path, names in zip(paths, named, strict=True):
        kinds = ["" if names[: i + 1] in silent else read_name(n)[0] for i, n in enumerate(names)]
        if path.parent in beside and names and not any(kinds):
            organ = common_name(names[-1])
            if organ == "tumour" or (organ in SYNONYMS and names[-1].isalpha()):
                free = (path.parent, read_name(names[-1])[1]) not in own["label"]
                kinds[-1] = "label" if free else ""
        items.append(_read_path(path, names, kinds, kind))
    return items


def _find_silent(named: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return the folders called label map whose word says nothing, because the names below tell
    scans and label maps apart: by words for both, or the same rest with a word and without. So does
    the folder that holds everything, if any name below it says label map."""
    below: dict[tuple[str, ...], dict[Kind, list[str]]] = {}
    for names in named:
        for i, name in enumerate(names[:-1], start=1):
            if read_name(name)[0] == "label":
                read = [read_name(inner) for inner in names[i:]]
                words = frozenset().union(*(words for *_, words in read))
                told: Kind = "label" if words & LABEL else "scan" if words & SCAN - DRAFT else ""
                kinds = below.setdefault(names[:i], {"label": [], "scan": [], "": []})
                kinds[told].append("_".join(word for _, rest, _ in read for word in rest))
    return {
        folder
        for folder, kinds in below.items()
        if kinds["label"]
        and (
            kinds["scan"]
            or set(kinds["label"]) & set(kinds[""])
            or sum(map(len, kinds.values())) == len(named) > len(kinds["label"])
        )
    }


def _read_path(path: Path, names: tuple[str, ...], kinds: Sequence[str], kind: Kind) -> Item:
    """Return the item of a path whose folders and name say `kinds`; FINAL and DRAFT count from the
    first one on that says label map."""
    read = [read_name(name) for name in names]
    first = kinds.index("label") if "label" in kinds else 0
    rank = frozenset().union(*(words for *_, words in read[first:]))
    parts = ["_".join(rest) for _, rest, _ in read]
    bare = parts[:first] + [
        "_".join(w for w in rest if w.lower() not in FINAL | DRAFT) for _, rest, _ in read[first:]
    ]
    return Item(
        path,
        kind or ("label" if "label" in kinds else "scan" if "scan" in kinds else ""),
        *(tuple(filter(None, some)) for some in (parts, bare, map(spell, names))),
        rank=bool(rank & FINAL) - bool(rank & DRAFT),
        by_folder=bool(kind) or "label" in kinds[:-1],
    )


# ---------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------


def uid(item: Item) -> dict[str, str]:
    """Return the series of an item, or the one that a SEG names."""
    return {item.dicom.uid: ""} if item.dicom and item.dicom.uid else {}


def whole(item: Item) -> dict[str, str]:
    """Return what remains of the whole path: `a_b/ct` and `a/b_ct` meet."""
    return {"_".join(item.parts): ""}


def tails(item: Item) -> dict[str, str]:
    """Return what remains of the path without its first folders."""
    return {"_".join(item.parts[n:]): "" for n in range(1, len(item.parts))}


def named_series(item: Item) -> dict[str, str]:
    """Return the series that a SEG names."""
    return uid(item) if item.form == "seg" else {}


def no_series(item: Item) -> dict[str, str]:
    """Return `whole`, but nothing of a series: beside its masks it is a picture of them all."""
    return whole(item) if item.form != "series" else {}


def without_structure(item: Item) -> dict[str, str]:
    """Return what remains without the structure → the structure: the last part of the path
    (`p1/liver_mask`), or its last words if they name organ or tumour (`p1_liver_seg`)."""
    if not item.parts:
        return {}
    *folders, last = item.parts
    words = last.split("_")
    known = [*itertools.takewhile(lambda word: word.lower() in WORD, reversed(words))][::-1]
    keys = {"_".join(folders): last} if folders or len(known) == len(words) else {}
    if 0 < len(known) < len(words):
        keys["_".join([*folders, *words[: -len(known)]])] = "_".join(known)
    return keys


@dataclass(frozen=True)
class Step:
    """A rule: a scan and a label map that share a key belong together."""

    rule: str
    scan: Callable[[Item], dict[str, str]]
    label: Callable[[Item], dict[str, str]]  # its values are structures


STEPS = (
    Step("the SEG names the series", uid, named_series),
    Step("the same remains of both paths", whole, no_series),
    Step("the label map names a structure more", whole, without_structure),
    Step("a whole label map as a series, where no masks are", whole, whole),
    Step("the scan's path has more folders", tails, whole),
    Step("the label map's path has more folders", whole, tails),
)  # then the only two of a folder: see `pair_alone`


@dataclass
class Fault:
    """What cannot be paired without a guess."""

    scans: list[Item]
    labels: list[Item]
    text: str


@dataclass
class Pairing:
    """Scans and label maps, and which belong together."""

    scans: list[Item]  # files and series
    labels: list[Item]  # files, series, SEGs, stacks of pictures
    found: dict[Item, Path | Masks] = field(default_factory=dict)  # scan → its label map
    faults: list[Fault] = field(default_factory=list)
    taken: set[Item] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Pairing:
        """Pair what can be paired by STEPS.

        If a series has no label map then, volumes that no word names and volumes among its slices
        are tried as label maps of series.
        """
        keys = {key for scan in self.scans for key in whole(scan)}
        self.labels = [  # `final` is part of a name where a scan has it too
            replace(one, parts=one.bare) if one.rank and not keys & {*whole(one)} else one
            for one in self.labels
        ]
        self.choose_channels()
        self.join_all()
        series = [scan for scan in self.free(self.scans) if scan.form == "series"]
        slices = {scan.folders[0] for scan in series}
        more = [
            scan
            for scan in self.free(self.scans)
            if series and scan.form == "file" and (not scan.kind or scan.path.parent in slices)
        ]
        if more:
            self.scans = [scan for scan in self.scans if scan not in more]
            self.labels += more
            self.join_all()
            self.labels = [one for one in self.labels if one not in more or one in self.taken]
        return self

    def choose_channels(self) -> None:
        """Name nnU-Net's first channels after their case and leave the further ones out.

        `x_0000` is x and `x_0001` … are further channels only if x has a label map and they have
        none of their own name. Nothing is stripped from label maps.
        """
        known = [(step.scan, {k for one in self.labels for k in step.label(one)}) for step in STEPS]

        def has_label(scan: Item) -> bool:
            return any(not told.isdisjoint(keys(scan)) for keys, told in known)

        kept = []
        for scan in self.scans:
            name, stem = name_case(scan.path), CHANNEL.sub("", name_case(scan.path))
            if scan.form == "file" and stem != name and not has_label(scan):
                rest = ("_".join(read_name(stem)[1]),)
                parts = (*scan.parts[:-1], *filter(None, rest))
                first = replace(scan, parts=parts, spelt=(*scan.spelt[:-1], spell(stem)))
                if has_label(first) and not name.endswith("_0000"):
                    continue
                scan = first if has_label(first) else scan
            kept.append(scan)
        if further := len(self.scans) - len(kept):
            self.notes.append(f"{further} further channels (_0001 …) are not used")
        self.scans = kept

    def free(self, items: Iterable[Item]) -> list[Item]:
        """Return those that no step took so far."""
        return [item for item in items if item not in self.taken]

    def join_all(self) -> None:
        """Apply all steps to what is free."""
        for step in STEPS:
            self.join(step)
        self.pair_alone()

    def join(self, step: Step) -> None:
        """Pair scans and label maps that share a key of a step, of several scans those of the
        label map's own form; report what fits several scans."""
        offered = defaultdict(list)
        for scan in self.free(self.scans):
            for key in step.scan(scan):
                offered[key].append(scan)
        of_scan: defaultdict[Item, dict[Item, str]] = defaultdict(dict)
        unclear = defaultdict(list)
        for label in self.free(self.labels):
            fits = {
                scan: structure
                for key, structure in step.label(label).items()
                for scan in offered.get(key, ())
                if label.kind == "label" or scan.form == "series"
            }
            near = [scan for scan in fits if scan.form == label.form] or list(fits)
            if len(near) > 1:
                unclear[tuple(near)].append(label)
            elif near:
                of_scan[near[0]][label] = fits[near[0]]
        for scans, labels in unclear.items():
            self.tell(scans, labels)
        for scan, found in of_scan.items():
            if scan not in self.taken:
                self.settle(scan, found)

    def settle(self, scan: Item, fits: dict[Item, str]) -> None:
        """Match a scan with what fits it: one label map, or masks of several structures. A final
        label map is taken before another one, and that before a draft."""
        best = {s: max(one.rank for one in fits if fits[one] == s) for s in set(fits.values())}
        kept = {one: structure for one, structure in fits.items() if one.rank == best[structure]}
        if left := [one for one in fits if one not in kept]:
            self.notes.append(
                f"several label maps of {show_path(scan.path)}: {show_path(next(iter(kept)).path)} "
                f"is taken, {' and '.join(show_path(one.path) for one in left)} not"
            )
            self.taken |= set(left)
        if len(kept) > 1 and not are_masks(kept):
            self.tell([scan], list(kept))
            return
        ((first, structure), *others) = kept.items()
        masks = others or (structure and first.form in ("series", "stack"))
        named = tuple((structure, one.path) for one, structure in kept.items())
        self.found[scan] = named if masks else first.path
        self.taken |= {scan, *kept}

    def tell(self, scans: Sequence[Item], labels: Sequence[Item]) -> None:
        """Make a fault of scans and label maps of which several fit."""
        several = labels if len(labels) > 1 else scans
        what = "label maps for one scan" if len(labels) > 1 else "scans for one label map"
        paths = " and ".join(show_path(one.path) for one in several[:6])
        text = f"{len(several)} {what}: {paths}; keep one, or tell them apart by their names"
        self.faults.append(Fault(list(scans), list(labels), text))
        self.taken |= {*scans, *labels}

    def pair_alone(self) -> None:
        """Pair the only scan and the only label map of a folder, unless their names disagree."""
        near: defaultdict[Path, tuple[list[Item], list[Item]]] = defaultdict(lambda: ([], []))
        for side, items in enumerate((self.scans, self.labels)):
            for item in items:
                for folder in item.folders:
                    near[folder][side].append(item)
        for scans, labels in near.values():
            if len(scans) == len(labels) == 1 and len(self.free([*scans, *labels])) == 2:
                if agree(scans[0], labels[0]):
                    self.settle(scans[0], {labels[0]: ""})


def are_masks(fits: dict[Item, str]) -> bool:
    """Return whether label maps are masks of several structures: known names, or a folder."""
    names = set(fits.values())
    known = all(set(common_name(name).split()) <= SYNONYMS.keys() for name in names)
    return len(names) == len(fits) and (known or all(label.by_folder for label in fits))


def agree(scan: Item, label: Item) -> bool:
    """Return whether the own names of two neighbours may be one patient's: one says nothing, both
    the same, or the label map's only names a structure. A SEG of no series says nothing."""
    own, other = ("_".join(read_name(name_case(one.path))[1]) for one in (scan, label))
    structure = all(word.lower() in WORD for word in other.split("_"))
    unnamed = label.form == "seg" and not uid(label)
    allowed = label.kind == "label" or scan.form == "series"
    return allowed and (not own or not other or own == other or structure or unnamed)


# ---------------------------------------------------------------------------------------
# What lies below a folder
# ---------------------------------------------------------------------------------------

EXPECTED = (
    "a scan and a label map that words such as images / labels, volume / segmentation, ct / mask "
    "in the names of folders or files tell apart and that are otherwise called alike; DICOM series "
    "with DICOM SEG, NIfTI label maps, MASKS_DICOM or Ground; or name two folders: --images FOLDER "
    "--labels FOLDER"
)


@dataclass
class Case:
    """A scan, its label map, and what its data set says about both; None where one is missing."""

    name: str
    patient: str = ""
    image: Path | None = None
    label: Path | Masks | None = None  # or (name, mask) of each structure
    faults: tuple[str, ...] = ()  # why it cannot be used: what is ambiguous, with both paths
    described: Description | None = None  # what the label map's values mean, if its data say so
    trust_grid: bool = False  # prepare.py laid the label map voxel on voxel
    modality: str = ""
    warnings: tuple[str, ...] = ()  # what prepare.py reported, accepted findings too
    accepted: tuple[str, ...] = ()  # kinds of findings that prepare.py was told to accept
    drawn: tuple[int, int] = (0, 1)  # an annotated slice (RAS) of the label map; every n-th is
    alone: bool = True  # no other case beside it


@dataclass
class DataSet:
    """What was recognised below a folder."""

    source: Path
    cases: list[Case]
    declared: Labels = field(default_factory=dict)  # name → raw values its label maps may hold
    ignore: tuple[int, ...] = ()  # raw values of unannotated voxels
    unused: list[Path] = field(default_factory=list)
    announced: int | None = None  # cases that dataset.json says there are
    notes: list[str] = field(default_factory=list)


def find_pairs(
    source: Path,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    exclude: Path | None = None,
    values: Labels | None = None,
) -> DataSet:
    """Return the cases of a data set, in natural order of their names, and its labels.

    Args:
        images, labels: folders of the scans and of the label maps, where names do not tell.
        exclude: folder below `source` that is not searched.
        values: label names and values as the user gives them; they replace the data's own.

    Raises InputError with what was expected where there is no pair.
    """
    if (images is None) != (labels is None):
        raise InputError("--images and --labels: give both folders, or neither")
    source, places = source.absolute(), [(source, "")]
    if images is not None and labels is not None:
        places = [(images.absolute(), "scan"), (labels.absolute(), "label")]
    pairing, seen = Pairing([], []), []
    for root, kind in places:
        items, notes = find_items(root, kind, exclude.absolute() if exclude else None)
        seen += items
        pairing.notes += notes
        for item in items:  # but imagesTs, labelsTs: the test cases of a challenge
            if not any(TS.search(part) for part in item.path.relative_to(root).parts[:-1]):
                (pairing.labels if item.kind == "label" else pairing.scans).append(item)
    data = DataSet(source, make_cases(pairing.run()), notes=pairing.notes)
    if not any(case.faults or (case.image and case.label) for case in data.cases):
        raise InputError(
            f"{show_path(source)}: no scans with label maps found among {len(seen)} volumes and "
            f"series; expected {EXPECTED}"
        )
    used = {path for case in data.cases for path in (case.image, *list_paths(case.label))}
    data.unused = [one.path for one in seen if one.path not in used and one.form != "stack"]
    declare(data, [one for one in seen if one.form == "seg" and one.path in used], values)
    return data


def find_items(
    root: Path, kind: Kind = "", exclude: Path | None = None, drafts: bool = False
) -> tuple[list[Item], list[str]]:
    """Return the volumes, series, SEGs and stacks of PNGs below a folder, and notes on them.

    Left out are cases that this program wrote; with `drafts`, or of kind "label", all but their
    label maps. A series that a SEG names is a scan.
    """
    if not root.is_dir():
        raise InputError(f"{show_path(root)}: no such folder; give the one with the scans")
    files, notes = leave_own(list_below(root, exclude), drafts or kind == "label")
    volumes = keep_volumes(files)
    known = set(volumes)
    pictures = {file.parent for file in files if file.suffix.lower() == ".png"}
    dicom = find_dicom([f for f in files if f not in known and f.suffix.lower() != ".png"])
    notes += [f"cannot be used: {item.fault}" for item in dicom if item.fault]
    series = {item.path: item for item in dicom if item.is_seg or not item.fault}
    drawn = {item.uid for item in dicom if item.is_seg}
    items = []
    for one in read_paths([*volumes, *series, *sorted(pictures - series.keys())], root, kind):
        found = series.get(one.path)
        if found and found.is_seg:
            one = replace(one, kind="label", form="seg", dicom=found)
        elif found:
            told: Kind = "scan" if found.uid in drawn else one.kind
            one = replace(one, kind=told, form="series", dicom=found)
        elif one.path in pictures:
            one = replace(one, form="stack")
        if one.form != "stack" or one.kind == "label":  # else pictures of anything
            items.append(one)
    return items, notes


def leave_own(files: Sequence[Path], drafts: bool) -> tuple[list[Path], list[str]]:
    """Return files without those of cases that this program prepared or segmented, and a note:
    label maps that a network made would pass for annotations. `drafts` keeps these label maps."""
    marks = [file for file in files if file.name in ("case.json", f"{file.parent.name}.json")]
    own = {mark.parent for mark in marks if is_own(mark)}
    names = {folder / f"{folder.name}_label.nii.gz" for folder in own} if drafts else set()
    kept = [file for file in files if file.parent not in own or file in names]
    notes = []
    if drafts and (found := sorted(names & set(kept))):
        notes.append(
            f"{len(found)} label maps are drafts of a network, such as {show_path(found[0])}: were "
            "they corrected?"
        )
    elif own and not drafts:
        notes.append(
            f"left out: {len(own)} cases that this program wrote, such as {show_path(min(own))}"
        )
    return kept, notes


def is_own(file: Path) -> bool:
    """Return whether a JSON file is this program's record of a case."""
    try:
        content = read_json(file)
    except InputError:
        return False
    return isinstance(content, dict) and bool({"mark", "fingerprint"} & content.keys())


def list_paths(label: Path | Masks | None) -> list[Path]:
    """Return the paths of a label map, or of the masks that make one."""
    if label is None:
        return []
    return [path for _, path in label] if isinstance(label, tuple) else [label]


# ---------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------


def make_cases(pairing: Pairing) -> list[Case]:
    """Return cases of pairs, of faults and of what stayed alone, each with a name of its own."""
    entries: list[tuple[Item, Path | None, Path | Masks | None, str]] = [
        (scan, scan.path, label, "") for scan, label in pairing.found.items()
    ]
    worded = any(scan.kind == "scan" for scan in pairing.found)
    series = any(scan.form == "series" for scan in pairing.scans)
    for scan in pairing.free(pairing.scans):
        words = {word.lower() for part in scan.parts for word in part.split("_")}
        if scan.dicom:
            pairing.notes.append(
                f"not used: {show_path(scan.path)}, a series of {scan.dicom.images} images without "
                "a label map"
            )
        elif not series and (scan.kind == "scan" or not worded) and not words & TEST:
            entries.append((scan, scan.path, None, ""))
    for fault in pairing.faults:
        image = fault.scans[0].path if fault.scans else None
        first = (fault.scans or fault.labels)[0]
        entries.append((first, image, fault.labels[0].path, fault.text))
    alone = (one for one in pairing.free(pairing.labels) if one.form in ("file", "seg"))
    entries += [(label, None, label.path, "") for label in alone]
    names = name_items([item for item, *_ in entries], pairing.notes)
    patients = name_patients(names, [item for item, *_ in entries], pairing.notes)
    cases = []
    for name, patient, (_, image, label, wrong) in zip(names, patients, entries, strict=True):
        paths = [path for path in (image, *list_paths(label)) if path is not None]
        bad = [show_path(path) for path in paths if show_path(path) != str(path)]
        faults = [wrong] * bool(wrong) + [
            f"{path}: its name is not UTF-8; rename it" for path in bad
        ]
        cases.append(Case(name, patient, image, label, tuple(faults)))
    return sorted(cases, key=lambda case: natural(case.name))


def name_items(items: Sequence[Item], notes: list[str]) -> list[str]:
    """Return a name for each item: what remains of its path; where nothing does, its folder."""
    parts = []
    for item in items:
        folder = item.folders[0] if item.form == "series" else item.path.parent
        spelt = item.spelt or (folder.name or "case",)
        if item.form == "series" and item.path.is_file():  # shares its folder with others
            assert item.dicom is not None
            digest = hashlib.sha256(item.dicom.uid.encode()).hexdigest()[:10]
            spelt = (*item.spelt[:-1], f"series_{digest}")
        parts.append(spelt)
    names = name_apart(parts)
    if longer := [n for n, p in zip(names, parts, strict=True) if n != make_safe(p[-1])]:
        notes.append(
            f"{len(longer)} cases are told apart by their folders, such as {longer[0]}; where a "
            "folder is a patient with several scans, name the patients: --patient-pattern"
        )
    return names


def name_apart(parts: Sequence[Sequence[str]]) -> list[str]:
    """Return a safe name for each path: its last part, and as many folders as tell it from the
    others; a checksum where only letters' case or forbidden signs do."""
    taken = [1] * len(parts)
    while True:
        names = [make_safe("_".join(p[-n:])) for p, n in zip(parts, taken, strict=True)]
        count = Counter(name.casefold() for name in names)
        alike = [index for index, name in enumerate(names) if count[name.casefold()] > 1]
        longer = [index for index in alike if taken[index] < len(parts[index])]
        if not longer:
            break
        for index in longer:
            taken[index] += 1
    for index in alike:
        mark = hashlib.sha256(f"{parts[index]}{index}".encode("utf-8", "replace"))
        names[index] = f"{names[index]}_{mark.hexdigest()[:6]}"
    return names


def name_patients(names: Sequence[str], items: Sequence[Item], notes: list[str]) -> list[str]:
    """Return the patient of each case: its own name, but the first case's of an equal PatientID.

    A PatientID of NOBODY, or one ID of all scans, is none; this and case names that look like
    several scans of a patient are reported.
    """
    ids = [item.dicom.patient.strip() if item.dicom else None for item in items]
    same = len(ids) > 1 and len(set(ids)) == 1 and ids[0] is not None
    nobody = [one for one in ids if one is not None and (same or one.lower() in NOBODY)]
    if len(nobody) > 1:
        shown = f'"{nobody[0]}"' if nobody[0].lower() in NOBODY else "the same"
        notes.append(
            f"{len(nobody)} series have {shown} as PatientID, which tells no patients apart: each "
            "case counts as a patient; if one has several scans: --patients or --patient-pattern"
        )
    first: dict[str, str] = {}
    patients = [
        first.setdefault(one, name) if one and one not in nobody else name
        for name, one in zip(names, ids, strict=True)
    ]
    if patients == list(names) and (pattern := guess_pattern(names)):
        notes.append(
            f"case names such as {' and '.join(names[:2])} look like several scans of a patient; "
            f"if they are, keep them in one split: --patient-pattern '{pattern}'"
        )
    return patients


# Case names of several scans of a patient: a date, counter, word or letter after what names him.
SEVERAL = (
    r"^(.+?)[_-](?:19|20)\d\d[_-]?\d\d[_-]?\d\d$",
    r"^(.+?)[_-][a-zA-Z]*\d{1,2}$",
    r"^(.*\d)[_-]?[a-zA-Z]+$",
    r"^(.*\d\d)\d\d$",
)


def guess_pattern(names: Sequence[str]) -> str | None:
    """Return the --patient-pattern that gives most patients two to five scans, none more; None
    where there is none. All but dates come in few forms: t1, t2."""
    for pattern in SEVERAL:
        found = [re.search(pattern, name) for name in names]
        stems = Counter(match[1] for match in found if match)
        ends = {name[match.end(1) :] for name, match in zip(names, found, strict=True) if match}
        if all(found) and len(stems) > 1 and max(stems.values()) <= 5:
            several = sum(count > 1 for count in stems.values())
            if 2 * several > len(stems) and (len(ends) <= 5 or pattern is SEVERAL[0]):
                return pattern
    return None


# ---------------------------------------------------------------------------------------
# Names and values of the labels
# ---------------------------------------------------------------------------------------


def declare(data: DataSet, segs: Sequence[Item], values: Labels | None) -> None:
    """Set what the labels are called: by the user, by dataset.json, by SEGs and masks."""
    if values:
        data.declared, data.ignore = part_ignored(values, "--values")
        if 0 not in list_values(data.declared):
            data.declared = {BACKGROUND: (0,)} | data.declared
        return
    labels = [case.label for case in data.cases if case.label]
    named = {seg.path for seg in segs}
    plain = [label for label in labels if isinstance(label, Path) and label not in named]
    masks = [label for label in labels if isinstance(label, tuple)]
    described, usual = describe([*plain, *masks], data.source)
    data.declared, data.ignore = described.labels, described.ignore
    data.announced = described.announced
    if usual is not None:
        data.notes.append(
            f"no dataset.json describes {show_path(usual)}: {describe_labels(USUAL_LABELS)} are "
            "assumed; if it has others: --values liver=1 tumour=2"
        )
    numbers: dict[str, int] = {}
    for seg in segs:
        for name, number in seg.dicom.segments.items() if seg.dicom else ():
            if find_label(name, numbers) is None:
                numbers[name] = number
    if numbers and not plain and not masks:  # only names that the SEGs have
        meant = {BACKGROUND, *map(common_name, numbers)}
        data.declared = {n: v for n, v in data.declared.items() if common_name(n) in meant}
    if chosen := choose_segment_values(numbers, data.declared):
        told = ", ".join(f"{name} = {value}" for name, value in chosen.items())
        data.notes.append(f"label values of the DICOM SEGs, by segment names: {told}")
    more = {n: (v,) for n, v in chosen.items() if find_label(n, data.declared) is None}
    data.declared = data.declared | more
    if described.path is None:
        declare_masks(data, masks)


def declare_masks(data: DataSet, masks: Sequence[Masks]) -> None:
    """Declare masks: liver and tumours have the usual values; if there are none, all have one."""
    names = sorted({name for label in masks for name, _ in label}, key=natural)
    others = [name for name in names if find_label(name, data.declared) is None]
    if names and len(others) == len(names):
        data.declared = {BACKGROUND: (0,), **{n: (i,) for i, n in enumerate(names, 1)}}
    elif others:
        told = ", ".join(others[:6]) + " …" * (len(others) > 6)
        data.notes.append(
            f"masks of {len(others)} other structures are not used ({told}); name those you want: "
            "--values liver=1 spleen=2"
        )


DESCRIBING = ("dataset.json", "datastore_v2.json")  # the latter of MONAI Label


def describe(
    labels: Sequence[Path | Masks], source: Path | None = None
) -> tuple[Description, Path | None]:
    """Return what describes label maps, and the first label map that nothing describes.

    These are the segments in a .seg.nrrd, and the nearest of DESCRIBING above each label map, up to
    `source`, else in two folders: it never reaches a neighbouring set, whose label maps then have
    USUAL_LABELS. Raises InputError where two contradict each other.
    """
    known: dict[Path, Description | None] = {}
    read: dict[Path, Description] = {}
    usual: Path | None = None
    for path, plain in {list_paths(one)[0]: isinstance(one, Path) for one in labels}.items():
        own = read_description(path) if plain and path.suffix.lower() == ".nrrd" else None
        if path.parent not in known:
            known[path.parent] = find_description(path.parent, source)
        found = [one for one in (known[path.parent], own) if one]
        read |= {one.path: one for one in found if one.path}
        usual = path if plain and not found and usual is None else usual
    told = [(show_path(path), one) for path, one in read.items()]
    told += (
        [(f"{show_path(usual)}, which no dataset.json describes,", Description())] if usual else []
    )
    for (where, one), (place, other) in itertools.combinations(told, 2):
        if contradict(one, other):
            raise InputError(
                f"{where} says {describe_labels(one.labels)}, {place} says "
                f"{describe_labels(other.labels)}; prepare one data set at a time, or give "
                "--values for both"
            )
    total = Description({}, path=next(iter(read), None))
    for _, one in told or [("", Description())]:
        total.labels |= {n: v for n, v in one.labels.items() if find_label(n, total.labels) is None}
        total.ignore = tuple(dict.fromkeys((*total.ignore, *one.ignore)))
        if one.announced is not None:
            total.announced = (total.announced or 0) + one.announced
    return total, usual


def find_description(folder: Path, source: Path | None) -> Description | None:
    """Return the nearest description in a folder or above it, up to `source`, else in two."""
    above = [folder, *folder.parents]
    within = [one for one in above if source and one.is_relative_to(source)]
    files = (place / name for place in within or above[:2] for name in DESCRIBING)
    return next((one for f in files if f.is_file() and (one := read_description(f))), None)


def contradict(one: Description, other: Description) -> bool:
    """Return whether two descriptions differ: two dataset.json in any label, else in a name or a
    value that both have."""
    ours, theirs = (
        {common_name(n): v for n, v in (d.labels | {"ignore": d.ignore}).items() if v}
        for d in (one, other)
    )
    if one.path and other.path and one.path.name == other.path.name == "dataset.json":
        return ours != theirs
    return any(
        values != raw if name == label else bool({*values} & {*raw})
        for name, values in ours.items()
        for label, raw in theirs.items()
    )


def describe_data_set(data: DataSet) -> list[str]:
    """Return the first lines that a user sees: three pairs, labels, what is unclear or unused."""

    def short(path: Path) -> str:
        inside = path.is_relative_to(data.source)
        return show_path(path.relative_to(data.source) if inside else path)

    pairs = [c for c in data.cases if c.image and c.label and not c.faults]
    lines = [f"{show_path(data.source)}: {len(pairs)} scans with label maps"]
    for case in pairs[:3]:
        paths = list_paths(case.label)
        more = f" and {len(paths) - 1} masks more" if len(paths) > 1 else ""
        lines.append(f"  {case.name}: {short(case.image or paths[0])} + {short(paths[0])}{more}")
    lines += [f"  and {len(pairs) - 3} more"] * (len(pairs) > 3)
    lines.append(f"labels: {describe_labels(data.declared)}")
    if data.ignore:
        lines.append(f"unannotated: voxels of {', '.join(map(str, data.ignore))}")
    lines += [f"unclear: {case.name}: {fault}" for case in data.cases for fault in case.faults]
    if data.announced not in (None, len(pairs)):
        lines.append(
            f"warning: dataset.json announces {data.announced} cases; download what is missing"
        )
    if data.unused:
        example = show_path(data.unused[0])
        lines.append(f"not used: {len(data.unused)} other volumes, such as {example}")
    return lines + data.notes


# ---------------------------------------------------------------------------------------
# Scans and truths that paths stand for
# ---------------------------------------------------------------------------------------


def find_scans(*paths: Path) -> list[Path]:
    """Return the scans that paths stand for: files; of a folder, the volumes and DICOM series at
    any depth. Several slices of a series are that series once.

    Prints what is left out: label maps by their names, and volumes among the slices of a series.
    Raises InputError for a folder without scan.
    """
    slices = [path for path in paths if path.is_file() and is_dicom(path)]
    series: dict[Path, Path] = {}
    for folder, count in Counter(path.parent for path in slices).items():
        for item in find_dicom(list_plain_files(folder)) if count > 1 else ():
            given = [file for file in item.files if file in slices]
            if len(given) > 1 and not item.is_seg and not item.fault:
                series |= dict.fromkeys(given, item.path)
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += _find_below(path)
        elif series.get(path) not in found:
            found.append(series.get(path, path))
    return found


def _find_below(folder: Path) -> list[Path]:
    """Return the volumes, then the series, in and below a folder."""
    items, notes = find_items(folder)
    slices = {item.folders[0] for item in items if item.form == "series"}
    volumes = [item for item in items if item.form in ("file", "series")]
    named = [item for item in volumes if item.kind != "label"] or volumes
    kept = [item for item in named if item.form == "series" or item.path.parent not in slices]
    if not kept:
        only = any(item.form == "seg" for item in items)
        what = "holds only DICOM SEGs, no scan" if only else "holds no scan"
        faults = "".join(f"; {note}" for note in notes)
        raise InputError(
            f"{show_path(folder)}: {what}; expected {', '.join(VOLUME_SUFFIXES)} files or DICOM "
            f"series{faults}"
        )
    if left := [item.path for item in volumes if item not in kept]:
        notes.append(f"left out: {len(left)} label maps or files among slices, such as {left[0]}")
    for note in notes:
        print(f"{show_path(folder)}: {note}")
    return [item.path for item in sorted(kept, key=lambda item: item.form == "series")]


def name_scans(paths: Sequence[Path], root: Path | None = None) -> list[str]:
    """Return unique safe case names: the last name, with folders below `root` where it comes twice.

    A name that is only a word of the tables, such as ct or scan, is that of its folder below
    `root`, as prepare.py has it, unless it has such a neighbour there.
    """
    there = os.path.abspath  # a link has its own name, and may lead nowhere
    top = Path(there(root or os.sep))
    parts, wordy = [], []
    for path in map(Path, map(there, paths)):
        inside = path.is_relative_to(top) and path != top
        folders = path.relative_to(top).parts[:-1] if inside else path.parts[1:-1]
        parts.append((*folders, name_case(path)))
        wordy.append(bool(root and inside and folders and not read_name(name_case(path))[1]))
    alone = Counter(part[:-1] for part, only in zip(parts, wordy, strict=True) if only)
    return name_apart(
        [
            part[:-1] if only and alone[part[:-1]] == 1 else part
            for part, only in zip(parts, wordy, strict=True)
        ]
    )


def find_labels(path: Path) -> list[Path]:
    """Return the label maps that a path stands for: a file; of a folder, what is called label map
    (results of apply_model.py too) and SEGs, or if nothing is, all volumes, series and stacks."""
    if not path.is_dir():
        return [path]
    items, notes = find_items(path, drafts=True)
    called = [item.path for item in items if item.kind == "label"]
    for note in notes:
        print(f"{show_path(path)}: {note}")
    return called or [item.path for item in items] or find_scans(path)


def pair_truths(scans: Sequence[Path], truth: Sequence[Path]) -> list[Path | Masks | None]:
    """Return a label map for each scan: of a folder, by `pair_by_name`; else one by one."""
    if len(truth) == 1 and truth[0].is_dir():
        known = find_labels(truth[0])
        if len(scans) > 1 or known != [truth[0]]:
            pairs = pair_by_name(scans, known)
            missing = [path.name for path, pair in zip(scans, pairs, strict=True) if pair is None]
            if missing:
                print(f"{truth[0]}: no label map for {', '.join(missing)}; not evaluated")
            return pairs
    if gone := [path for path in truth if not path.exists()]:
        raise InputError(f"--truth {gone[0]}: no such file or folder; check the path")
    if truth and len(truth) != len(scans):
        raise InputError(
            f"--truth must give one label map per volume, got {len(truth)} for {len(scans)}"
        )
    return list(truth) or [None] * len(scans)


def pair_by_name(scans: Sequence[Path], truths: Sequence[Path]) -> list[Path | Masks | None]:
    """Return the label map of each scan by STEPS; None where there is none.

    Raises InputError where a name fits several, and where none fits at all.
    """
    if not scans or not truths:
        return [None] * len(scans)
    pairing = Pairing(_read_given(scans, "scan"), _read_given(truths, "label")).run()
    if pairing.faults:
        raise InputError(pairing.faults[0].text)
    if not pairing.found:
        raise InputError(
            f"none of {len(truths)} label maps such as {show_path(truths[0])} is called like one "
            f"of {len(scans)} scans such as {show_path(scans[0])}; rename them alike, or give one "
            "label map per scan in the same order"
        )
    for note in pairing.notes:
        print(note)
    found = {scan.path: label for scan, label in pairing.found.items()}
    return [found.get(path) for path in scans]


def _read_given(paths: Sequence[Path], kind: Kind) -> list[Item]:
    """Return items of given paths; of DICOM with the header of one file."""
    there = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in there]))
    first: dict[Path, Path] = {}
    for path in paths:
        files = list_plain_files(path) if path.is_dir() else [path]
        first |= {path: file for file in files if path not in first and is_dicom(file)}
    dicom = {item.files[0]: item for item in find_dicom(first.values())}
    items = []
    for path, item in zip(paths, read_paths(there, root, kind), strict=True):
        known = dicom.get(first.get(path, path))
        form = (
            ("seg" if known.is_seg else "series") if known else "stack" if path.is_dir() else "file"
        )
        items.append(replace(item, path=path, form=form, dicom=known))
    return items


def describe_truths(path: Path | Masks) -> Description | None:
    """Return what describes a label map beside it or in its header; None where nothing does."""
    described, _ = describe([path])
    return described if described.path else None
