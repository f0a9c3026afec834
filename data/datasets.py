"""Recognise a data set on disk: which file is a scan, which its label map, and whose they are.

Words in the names of folders and files say what is a scan (image, ct …) and what a label map
(label, mask …). Without these words, the rest of the path says whose it is: a scan and a label map
with the same rest are a pair. `STEPS` lists all rules, the surest first. Where several fit, the
case has a fault that names their paths. What is left out is reported.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from data.dicom import DicomItem, find_dicom, is_dicom
from data.files import InputError, list_below, list_plain_files, make_safe, natural, read_json
from data.files import show_path as show
from data.labels import (
    BACKGROUND,
    SYNONYMS,
    USUAL_LABELS,
    WORD,
    Description,
    Labels,
    Masks,
    common_name,
    describe,
    describe_labels,
    find_label,
    list_paths,
    part_ignored,
)
from data.seg import choose_segment_values
from data.volumes import VOLUME_SUFFIXES, keep_volumes, name_case

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
FILLER = {"tr", "train", "training", "anon", "patient", "nifti", "nii"}  # nothing beside those
FINAL = {"final", "corrected", "revised", "reviewed", "approved", "edited", "verified", "manual"}
DRAFT = {  # and FINAL: of two label maps of one scan
    "original", "orig", "draft", "initial", "auto", "automatic", "uncorrected", "predicted", "pred",
    "old", "backup", "preliminary", "unedited",
}  # fmt: skip
TEST = {"test", "testing"}  # cases of a challenge, whose label maps nobody has

SEPARATORS = re.compile(r"[\s_\-.,;()\[\]]+")
PLACES = re.compile(  # where a word begins in a name: imagesTr, CTscan, img0001, 1mask, liverseg
    r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z]{2})(?=[a-z])|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)|(?<=[^\W\d_])"
    r"(?=(?i:labels?|segmentations?|seg|masks?|truth|annotations?|outlines?)(?![^\W\d_]))"
)
TUMOURS, LIVER = ("|".join(SYNONYMS[organ]) for organ in ("tumour", "liver"))
ORGANS = re.compile(  # at the end of a name: p1_liver, p1_livertumor2
    rf"(?:^|_)((?:(?:(?:{LIVER})?(?:{TUMOURS})(?:_?\d+)?|{LIVER})(?:_(?=.)|$))+)$", re.IGNORECASE
)
CHANNEL = re.compile(r"_\d{4}$")  # nnU-Net: x_0000 is the first channel of x
TEST_FOLDER = re.compile(r"(?:^|[^A-Z])Ts$")  # imagesTs, labelsTs

Kind = Literal["scan", "label", ""]


@cache
def read_name(text: str) -> tuple[Kind, tuple[str, ...], frozenset[str]]:
    """Return what a name says (a label map wins over a scan), the words that remain without those
    of the tables, and all its words in small letters."""
    pieces = [PLACES.split(piece) for piece in SEPARATORS.split(normalize("NFC", text)) if piece]
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
    rank: int  # of a label map: 1 final, -1 draft
    by_folder: bool  # a folder, not only the name, says label map
    form: Literal["file", "series", "seg", "stack"] = "file"
    dicom: DicomItem | None = None

    @cached_property
    def folders(self) -> list[Path]:
        """The folder of its files, and those above it in which its partner may lie."""
        own = [self.path] if self.form == "series" and self.path.is_dir() else []
        count = {"series": 3, "seg": 2}.get(self.form, 1) - len(own)
        return [*own, *self.path.parents[:count]]

    @cached_property
    def keys(self) -> dict[str, dict[str, str]]:
        """Its keys by kind, each with the structure that it leaves out: the last part of the path
        (`p1/liver_mask`), or its last words if they name organ or tumour (`p1_liver_seg`)."""
        *folders, last = self.parts or ("",)
        match = ORGANS.search(last)
        rest = last[: match.start()] if match else last
        organ = {"_".join(folders): last} if folders or not rest else {}
        if match and rest:
            organ["_".join([*folders, rest])] = match[1]
        whole = {"_".join(self.parts): ""}  # a_b/ct and a/b_ct meet
        tails = {"_".join(self.parts[n:]): "" for n in range(1, len(self.parts))}
        return {
            "uid": {self.dicom.uid: ""} if self.dicom and self.dicom.uid else {},
            "whole": whole,
            "no series": whole if self.form != "series" else {},  # beside masks a picture of all
            "without structure": organ,
            "tails": tails,
            "any": whole | tails,
        }

    def with_dicom(self, found: DicomItem, drawn: Collection[str] = ()) -> Item:
        """Return the item as the series or SEG at its path; a series of `drawn` UIDs is a scan."""
        if found.is_seg:
            return replace(self, kind="label", form="seg", dicom=found)
        kind: Kind = "scan" if found.uid in drawn else self.kind
        return replace(self, kind=kind, form="series", dicom=found)


def read_paths(paths: Sequence[Path], root: Path, kind: Kind = "") -> list[Item]:
    """Return an item for each path by the words of its folders below `root` and of its name; `kind`
    overrules them. A file only called liver, or tumour with a number, is a label map beside one
    that is called a scan, unless it has a label map of its own name."""
    named = [(*p.relative_to(root).parts[:-1], name_case(p)) if p != root else () for p in paths]
    silent = _find_silent(named)
    own = defaultdict(set)  # of each kind by their own names: folder, what remains
    for path in paths:
        told, rest, _ = read_name(name_case(path))
        own[told].add((path.parent, rest))
    beside = {folder for folder, _ in own["scan"]}
    items = []
    for path, names in zip(paths, named, strict=True):
        kinds = ["" if names[: i + 1] in silent else read_name(n)[0] for i, n in enumerate(names)]
        if path.parent in beside and names and not any(kinds):
            organ = common_name(names[-1])
            if organ == "tumour" or (organ in SYNONYMS and names[-1].isalpha()):
                has_label = (path.parent, read_name(names[-1])[1]) in own["label"]
                kinds[-1] = "" if has_label else "label"
        items.append(_read_path(path, names, kinds, kind))
    return items


def _find_silent(named: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return folders called label map whose word says nothing: the names below tell both kinds
    apart, by words for both or by the same rest with a word and without."""
    below: defaultdict[tuple[str, ...], set[tuple[str, str]]] = defaultdict(set)
    for names in named:
        for i in range(1, len(names)):
            if read_name(names[i - 1])[0] == "label":
                kinds, rests, words = zip(*map(read_name, names[i:]), strict=True)
                scan = "scan" if frozenset().union(*words) & SCAN - DRAFT else ""
                rest = "_".join(itertools.chain(*rests))
                below[names[:i]].add(("label" if "label" in kinds else scan, rest))
    return {
        folder
        for folder, found in below.items()
        for kind, rest in found
        if (kind == "scan" and "label" in dict(found)) or (not kind and ("label", rest) in found)
    }


def _read_path(path: Path, names: tuple[str, ...], kinds: Sequence[str], kind: Kind) -> Item:
    """Return the item of a path whose folders and name say `kinds`. Words of FINAL and DRAFT count
    from the first name on that says label map, or is such words alone just above it."""
    read = [read_name(name) for name in names]
    first = kinds.index("label") if "label" in kinds else 0
    first -= first > 0 and read[first - 1][2] <= FINAL | DRAFT
    words = {word for *_, words in read[first:] for word in words}
    parts = ["_".join(rest) for _, rest, _ in read]
    kept = [[w for w in rest if w.lower() not in FINAL | DRAFT] for _, rest, _ in read]
    bare = ["" if {*map(str.lower, some)} <= FILLER else "_".join(some) for some in kept]
    return Item(
        path,
        kind or ("label" if "label" in kinds else "scan" if "scan" in kinds else ""),
        tuple(filter(None, parts)),
        tuple(filter(None, parts[:first] + bare[first:])),
        tuple(filter(None, map(spell, names))),
        rank=bool(words & FINAL) - bool(words & DRAFT),
        by_folder=bool(kind) or "label" in kinds[:-1],
    )


# Pairs
STEPS = (  # a scan and a label map that share a key, of these kinds, are a pair
    ("uid", "uid"),  # the SEG names the series
    ("whole", "no series"),  # the same remains of both paths
    ("whole", "without structure"),  # the label map names a structure more
    ("whole", "whole"),  # a whole label map as a series, where no masks are
    ("tails", "whole"),  # the scan's path has more folders
    ("whole", "tails"),  # the label map's path has more folders
)  # then the only two of a folder, see `pair_alone`
Entry = tuple[Item, Path | None, Path | Masks | None, tuple[str, ...]]  # scan, label map, faults


@dataclass
class Pairing:
    """Scans and label maps, and which belong together."""

    scans: list[Item]  # files and series
    labels: list[Item]  # files, series, SEGs, stacks of pictures
    found: dict[Item, Path | Masks] = field(default_factory=dict)  # scan → its label map
    faults: list[tuple[Sequence[Item], Sequence[Item], str]] = field(default_factory=list)
    taken: set[Item] = field(default_factory=set)
    drafts: list[Path] = field(default_factory=list)  # left out beside final label maps
    notes: list[str] = field(default_factory=list)

    def run(self) -> Pairing:
        """Pair by STEPS, channels and drafts left out."""
        keys = {CHANNEL.sub("", key) for scan in self.scans for key in scan.keys["whole"]}
        self.labels = [  # `final` is part of a name where a scan has it too
            replace(one, parts=one.bare) if one.rank and not keys & {*one.keys["whole"]} else one
            for one in self.labels
        ]
        if channels := [scan for scan in self.scans if CHANNEL.search(name_case(scan.path))]:
            self.choose_channels(channels)
        self.join_all()
        if any(scan.form == "series" for scan in self.free(self.scans)):
            self.join_volumes()
        if self.drafts:
            count = f"{len(self.drafts)} label maps beside final ones"
            self.notes.append(f"not used: {count}, such as {show(self.drafts[0])}")
        return self

    def join_volumes(self) -> None:
        """Pair series with volumes that no word names, or that lie among their slices."""
        free = self.free(self.scans)
        series = {scan.folders[0] for scan in free if scan.form == "series"}
        more = [one for one in free if not one.kind or one.path.parent in series]
        more = [one for one in more if one.form == "file"]
        self.scans = [scan for scan in self.scans if scan not in more]
        self.labels += more
        self.join_all()
        self.labels = [one for one in self.labels if one not in more or one in self.taken]

    def choose_channels(self, channels: Sequence[Item]) -> None:
        """Name nnU-Net's first channels (`x_0000`) after their case, x, and leave the further ones
        (`x_0001` …) out, if x has a label map and they have none. Label maps keep their names."""
        known = {key for one in self.labels for some in one.keys.values() for key in some} - {""}
        renamed: dict[Item, list[Item]] = {}
        for scan in channels:
            stem = CHANNEL.sub("", name := name_case(scan.path))
            rest = filter(None, ["_".join(read_name(stem)[1])])
            spelt = (*scan.spelt[:-1], spell(stem))
            case = replace(scan, parts=(*scan.parts[:-1], *rest), spelt=spelt)
            free = scan.form == "file" and known.isdisjoint(scan.keys["any"])
            if free and not known.isdisjoint(case.keys["any"]):
                renamed[scan] = [case] if name.endswith("_0000") else []
        self.scans = [one for scan in self.scans for one in renamed.get(scan, [scan])]
        if further := sum(not cases for cases in renamed.values()):
            self.notes.append(f"{further} further channels (_0001 …) are not used")

    def free(self, items: Iterable[Item]) -> list[Item]:
        """Return those that no step took so far."""
        return [item for item in items if item not in self.taken]

    def join_all(self) -> None:
        """Apply all steps to what is free."""
        for of_scans, of_labels in STEPS:
            self.join(of_scans, of_labels)
        if self.free(self.scans):
            self.pair_alone()

    def join(self, of_scans: str, of_labels: str) -> None:
        """Pair scans and label maps that share a key, of several scans that of its own form."""
        offered = defaultdict(list)
        for scan in self.free(self.scans):
            for key in scan.keys[of_scans]:
                offered[key].append(scan)
        of_scan: defaultdict[Item, dict[Item, str]] = defaultdict(dict)
        unclear = defaultdict(list)
        for label in self.free(self.labels):
            fits = {
                scan: structure
                for key, structure in label.keys[of_labels].items()
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
        """Match a scan with a label map or masks: final ones before others, these before drafts."""
        best = {s: max(one.rank for one in fits if fits[one] == s) for s in set(fits.values())}
        kept = {one: structure for one, structure in fits.items() if one.rank == best[structure]}
        self.drafts += [one.path for one in fits if one not in kept]
        self.taken |= {scan, *fits}
        names = set(kept.values())
        masks = len(names) == len(kept) and all(is_mask(*one) for one in kept.items())
        if len(kept) > 1 and not masks:
            self.tell([scan], list(kept))
            return
        ((first, structure), *others) = kept.items()
        named = others or (structure and first.form in ("series", "stack"))
        together = tuple((structure, one.path) for one, structure in kept.items())
        self.found[scan] = together if named else first.path

    def tell(self, scans: Sequence[Item], labels: Sequence[Item]) -> None:
        """Make a fault of scans and label maps of which several fit."""
        several = labels if len(labels) > 1 else scans
        what = "label maps for one scan" if len(labels) > 1 else "scans for one label map"
        paths = " and ".join(show(one.path) for one in several[:6])
        text = f"{len(several)} {what}: {paths}; keep one, or tell them apart by their names"
        self.faults.append((scans, labels, text))
        self.taken |= {*scans, *labels}

    def pair_alone(self) -> None:
        """Pair the only scan and the only label map of a folder, unless their names disagree."""
        near: defaultdict[Path, tuple[list[Item], list[Item]]] = defaultdict(lambda: ([], []))
        for side, items in enumerate((self.scans, self.labels)):
            for item in items:
                for folder in item.folders:
                    near[folder][side].append(item)
        for both in near.values():
            alone = [one for items in both if len(items) == 1 for one in self.free(items)]
            if len(alone) == 2 and agree(*alone):
                self.settle(alone[0], {alone[1]: ""})


def is_mask(label: Item, structure: str) -> bool:
    """Return whether a label map may be the mask of one of several structures."""
    return label.by_folder or set(common_name(structure).split()) <= SYNONYMS.keys()


def agree(scan: Item, label: Item) -> bool:
    """Return whether the own names of two neighbours may be one patient's: one says nothing, both
    the same, or the label map's only names a structure. A SEG of no series says nothing."""
    own, other = ("_".join(read_name(name_case(one.path))[1]) for one in (scan, label))
    structure = all(word.lower() in WORD for word in other.split("_") if word)
    unnamed = label.form == "seg" and not label.keys["uid"]
    fits = label.kind == "label" or scan.form == "series"
    return fits and (not own or own == other or structure or unnamed)


# What lies below a folder


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
    patient_id: str | None = None  # of DICOM; never written anywhere


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
    source: Path, *, images: Path | None = None, labels: Path | None = None,
    exclude: Path | None = None, values: Labels | None = None,
) -> DataSet:  # fmt: skip
    """Return the cases of a data set, in natural order, and its labels or the given `values`."""
    if (images is None) != (labels is None):
        raise InputError("--images and --labels: give both folders, or neither")
    source, exclude = source.absolute(), exclude and exclude.absolute()
    places: dict[Kind, Path] = {"": source}
    if images and labels:
        places = {"scan": images.absolute(), "label": labels.absolute()}
    pairing, seen = Pairing([], []), []
    for kind, root in places.items():
        items = find_items(root, pairing.notes, kind, exclude)
        seen += items
        for item in items:  # but imagesTs, labelsTs: the test cases of a challenge
            if not any(map(TEST_FOLDER.search, item.path.relative_to(root).parts[:-1])):
                (pairing.labels if item.kind == "label" else pairing.scans).append(item)
    data = DataSet(source, make_cases(pairing.run()), notes=pairing.notes)
    if not any(case.faults or (case.image and case.label) for case in data.cases):
        raise InputError(
            f"{show(source)}: no scans with label maps among {len(seen)} volumes and series; "
            "expected names that differ by words such as images / labels alone, or DICOM series "
            "with SEG, NIfTI label maps or masks; or give --images FOLDER --labels FOLDER"
            + "".join(f"; {note}" for note in data.notes[:3])
        )
    used = {path for case in data.cases for path in (case.image, *list_paths(case.label))}
    data.unused = [one.path for one in seen if one.path not in used and one.form != "stack"]
    declare(data, [one for one in seen if one.form == "seg" and one.path in used], values)
    return data


def find_items(
    root: Path, notes: list[str], kind: Kind = "", exclude: Path | None = None,
    drafts: bool = False, broken: bool = False,
) -> list[Item]:  # fmt: skip
    """Return the volumes, series, SEGs and stacks of PNGs below a folder; add notes on what is left
    out. `drafts` keeps label maps of this program, `broken` series that cannot be read."""
    if not root.is_dir():
        raise InputError(f"{show(root)}: no such folder; give the one with the scans")
    files = leave_own(list_below(root, exclude), notes, drafts or kind == "label")
    volumes = keep_volumes(files)
    pngs = [file for file in files if file.suffix.lower() == ".png"]
    rest = sorted({*files} - {*volumes, *pngs})
    dicom = find_dicom(rest) if any(map(is_dicom, rest)) else []
    notes += [f"cannot be used: {item.fault}" for item in dicom if item.fault]
    kept = (one for one in dicom if one.is_seg or not one.fault or (broken and one.broken))
    series = {item.path: item for item in kept}
    drawn = {item.uid for item in dicom if item.is_seg}
    pictures = {file.parent for file in pngs} - series.keys()
    items = []
    for item in read_paths([*volumes, *series, *sorted(pictures)], root, kind):
        if item.path in series:
            items.append(item.with_dicom(series[item.path], drawn))
        elif item.path not in pictures:
            items.append(item)
        elif item.kind == "label":  # else pictures of anything
            items.append(replace(item, form="stack"))
    return items


def leave_own(files: Sequence[Path], notes: list[str], drafts: bool) -> list[Path]:
    """Return files without those of cases that this program prepared or segmented: label maps that
    a network made would pass for annotations. `drafts` keeps these label maps. Add a note."""
    own = set()
    for file in files:
        if file.name in ("case.json", f"{file.parent.name}.json"):
            with suppress(InputError, TypeError):
                own |= {file.parent} if "mark" in read_json(file) else set()
    names = {folder / f"{folder.name}_label.nii.gz" for folder in own if drafts}
    if names:
        notes.append(f"{len(names)} label maps are drafts of a network, such as {min(names)}")
    elif own:
        notes.append(f"left out: {len(own)} cases that this program wrote, such as {min(own)}")
    return [file for file in files if file.parent not in own or file in names]


def make_cases(pairing: Pairing) -> list[Case]:
    """Return cases of pairs, of faults and of what stayed alone, each with a name of its own."""
    entries: list[Entry] = [(s, s.path, label, ()) for s, label in pairing.found.items()]
    entries += [(s[0], s[0].path, labels[0].path, (text,)) for s, labels, text in pairing.faults]
    if pairing.free([*pairing.scans, *pairing.labels]):
        entries += list_lone(pairing)
    parts = [spell_item(item) for item, *_ in entries]
    names = name_apart(parts)
    if longer := [n for n, p in zip(names, parts, strict=True) if n != make_safe(p[-1])]:
        what = (
            f"{len(longer)} cases are told apart by their folders, such as {longer[0]}; where one"
        )
        pairing.notes.append(f"{what} is a patient with several scans: --patient-pattern")
    cases = []
    for name, (item, image, label, wrong) in zip(names, entries, strict=True):
        paths = [path for path in (image, *list_paths(label)) if path is not None]
        bad = [f"{show(p)}: its name is not UTF-8; rename it" for p in paths if show(p) != str(p)]
        patient = item.dicom.patient if item.dicom else None
        cases.append(Case(name, name, image, label, (*wrong, *bad), patient_id=patient))
    return sorted(cases, key=lambda case: natural(case.name))


def list_lone(pairing: Pairing) -> Iterator[Entry]:
    """Yield what lacks its partner: scans, but test cases; label maps, but masks of a scan that has
    others. A series without label map is a note alone."""
    worded = any(scan.kind == "scan" for scan in pairing.found)
    series = any(scan.form == "series" for scan in pairing.scans)
    for scan in pairing.free(pairing.scans):
        words = {word.lower() for part in scan.parts for word in part.split("_")}
        if scan.dicom:
            what = f"a series of {scan.dicom.images} images without a label map"
            pairing.notes.append(f"not used: {show(scan.path)}, {what}")
        elif not series and (scan.kind == "scan" or not worded) and not words & TEST:
            yield scan, scan.path, None, ()
    keys = {key for scan in pairing.found for key in scan.keys["whole"]}
    for one in pairing.free(pairing.labels):
        organs = [s for key, s in one.keys["without structure"].items() if key in keys]
        if one.form in ("file", "seg") and not any(is_mask(one, organ) for organ in organs):
            text = f"{show(one.path)}: its scan has another label map; keep one, or call one final"
            yield one, None, one.path, (text,) * bool(organs)


def spell_item(item: Item) -> tuple[str, ...]:
    """Return what names a case: what remains of its path; where nothing does, its folder."""
    if item.dicom and item.form == "series" and item.path.is_file():  # beside others in a folder
        digest = hashlib.sha256(item.dicom.uid.encode()).hexdigest()[:10]
        return (*item.spelt[:-1], f"series_{digest}")
    return item.spelt or (item.folders[0].name or "case",)


def name_apart(parts: Sequence[Sequence[str]]) -> list[str]:
    """Return a safe name for each path: its last part, with as many folders as tell it from the
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


def declare(data: DataSet, segs: Sequence[Item], values: Labels | None) -> None:
    """Set what the labels are called: by the user, by dataset.json, by SEGs and masks."""
    if values:
        named, data.ignore = part_ignored(values, "--values")
        data.declared = {BACKGROUND: (0,)} | named
        return
    own = {seg.path for seg in segs}
    files = [case.label for case in data.cases if case.label and case.label not in own]
    described, usual = describe(files, data.source)
    data.declared, data.ignore = described.labels, described.ignore
    data.announced = described.announced
    if usual:
        what = f"no dataset.json describes {show(usual[0])}: {describe_labels(USUAL_LABELS)}"
        data.notes.append(f"{what} are assumed; if it has others: --values liver=1 tumour=2")
    if segs:
        declare_segments(data, segs, alone=not files)
    masks = {name for label in files if isinstance(label, tuple) for name, _ in label}
    if masks and described.path is None:
        declare_masks(data, masks)


def declare_segments(data: DataSet, segs: Sequence[Item], alone: bool) -> None:
    """Give names of DICOM SEGs the values of labels; only those, if there are SEGs alone."""
    numbers: dict[str, int] = {}
    for name, number in (pair for s in segs if s.dicom for pair in s.dicom.segments.items()):
        if find_label(name, numbers) is None:
            numbers[name] = number
    if chosen := choose_segment_values(numbers, data.declared):
        told = ", ".join(f"{name} = {value}" for name, value in chosen.items())
        data.notes.append(f"label values of the DICOM SEGs, by segment names: {told}")
    more = {n: (v,) for n, v in chosen.items() if find_label(n, data.declared) is None}
    if chosen and alone:
        meant = {BACKGROUND, *map(common_name, chosen)}
        data.declared = {n: v for n, v in data.declared.items() if common_name(n) in meant}
    data.declared |= more


def declare_masks(data: DataSet, names: set[str]) -> None:
    """Number the structures of masks; where liver or tumours are among them, use these alone."""
    others = sorted((n for n in names if find_label(n, data.declared) is None), key=natural)
    if len(others) == len(names):
        data.declared = {BACKGROUND: (0,), **{n: (i,) for i, n in enumerate(others, 1)}}
    elif others:
        what = f"masks of {len(others)} other structures are not used ({', '.join(others[:6])} …)"
        data.notes.append(f"{what}; name those you want: --values liver=1 spleen=2")


def describe_data_set(data: DataSet) -> list[str]:
    """Return the first lines that a user sees: three pairs, labels, what is unclear or unused."""
    pairs = [case for case in data.cases if case.image and case.label and not case.faults]
    lines = [f"{show(data.source)}: {len(pairs)} scans with label maps"]
    for case in pairs[:3]:
        paths = [Path(os.path.relpath(p, data.source)) for p in list_paths(case.label)]
        more = f" and {len(paths) - 1} masks more" if len(paths) > 1 else ""
        image = Path(os.path.relpath(case.image or "", data.source))
        lines.append(f"  {case.name}: {show(image)} + {show(paths[0])}{more}")
    lines += [f"  and {len(pairs) - 3} more"] * (len(pairs) > 3)
    lines.append(f"labels: {describe_labels(data.declared)}")
    if data.ignore:
        lines.append(f"unannotated: voxels of {', '.join(map(str, data.ignore))}")
    lines += [f"unclear: {case.name}: {fault}" for case in data.cases for fault in case.faults]
    if (count := data.announced) not in (None, len(pairs)):
        lines.append(f"warning: dataset.json announces {count} cases; download what is missing")
    if data.unused:
        lines.append(f"not used: {len(data.unused)} other volumes, such as {show(data.unused[0])}")
    return lines + data.notes


# Scans and truths that paths stand for


def find_scans(*paths: Path) -> list[Path]:
    """Return the scans that paths stand for: files; of a folder, the volumes and DICOM series at
    any depth. Several slices of a series are that series once. Prints what is left out."""
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
    notes: list[str] = []
    items = find_items(folder, notes, broken=True)
    slices = {item.folders[0] for item in items if item.form == "series"}
    volumes = [item for item in items if item.form in ("file", "series")]
    scans = [item for item in volumes if item.kind != "label"] or volumes
    kept = [item for item in scans if item.form == "series" or item.path.parent not in slices]
    if not kept:
        what = "holds only DICOM SEGs or pictures, no scan" if items else "holds no scan"
        what += f"; expected {', '.join(VOLUME_SUFFIXES)} files or DICOM series"
        raise InputError("; ".join([f"{show(folder)}: {what}", *notes]))
    if left := [item.path for item in volumes if item not in kept]:
        notes.append(f"left out: {len(left)} label maps or files among slices, such as {left[0]}")
    for note in notes:
        print(f"{show(folder)}: {note}")
    return [item.path for item in sorted(kept, key=lambda item: item.form == "series")]


def name_scans(paths: Sequence[Path], root: Path | None = None) -> list[str]:
    """Return unique safe case names: the last name, with folders below `root` where it comes twice.
    A name that is only a word of the tables, such as ct or scan, is that of its folder below
    `root`, as prepare.py has it, unless it has such a neighbour there."""
    there = os.path.abspath  # a link has its own name, and may lead nowhere
    top, parts = Path(there(root or os.sep)), []
    for path in map(Path, map(there, paths)):
        below = path.relative_to(top) if path.is_relative_to(top) else path
        parts.append((*below.parts[:-1], name_case(path)))
    words = {part for part in parts if root and part[:-1] and not read_name(part[-1])[1]}
    alone = Counter(part[:-1] for part in words)
    return name_apart([p[:-1] if p in words and alone[p[:-1]] == 1 else p for p in parts])


def find_labels(path: Path) -> list[Path]:
    """Return the label maps that a path stands for: a file; of a folder, what is called label map
    (results of apply_model.py too) and SEGs, or if nothing is, all volumes and series."""
    if not path.is_dir():
        return [path]
    notes: list[str] = []
    items = find_items(path, notes, drafts=True)
    for note in notes:
        print(f"{show(path)}: {note}")
    called = [item.path for item in items if item.kind == "label"]
    return called or [item.path for item in items] or find_scans(path)


def pair_truths(scans: Sequence[Path], truth: Sequence[Path]) -> list[Path | Masks | None]:
    """Return a label map for each scan: of a folder, by `pair_by_name`; else one by one."""
    folder = len(truth) == 1 and truth[0].is_dir()
    known = find_labels(truth[0]) if folder else []
    if folder and (len(scans) > 1 or known != list(truth)):
        pairs = pair_by_name(scans, known)
        if missing := [path.name for path, pair in zip(scans, pairs, strict=True) if pair is None]:
            print(f"{truth[0]}: no label map for {', '.join(missing)}; not evaluated")
        return pairs
    if gone := [path for path in truth if not path.exists()]:
        raise InputError(f"--truth {gone[0]}: no such file or folder; check the path")
    if truth and len(truth) != len(scans):
        what = "--truth must give one label map per volume,"
        raise InputError(f"{what} got {len(truth)} for {len(scans)}")
    return list(truth) or [None] * len(scans)


def pair_by_name(scans: Sequence[Path], truths: Sequence[Path]) -> list[Path | Masks | None]:
    """Return the label map of each scan by STEPS, or None; InputError where none fits at all."""
    if not scans or not truths:
        return [None] * len(scans)
    pairing = Pairing(_read_given(scans, "scan"), _read_given(truths, "label")).run()
    if pairing.faults:
        raise InputError(pairing.faults[0][-1])
    if not pairing.found:
        raise InputError(
            f"none of {len(truths)} label maps such as {show(truths[0])} is called like one of "
            f"{len(scans)} scans such as {show(scans[0])}; rename them alike, or give one label "
            "map per scan in the same order"
        )
    for note in pairing.notes:
        print(note)
    found = {scan.path: label for scan, label in pairing.found.items()}
    return [found.get(path) for path in scans]


def _read_given(paths: Sequence[Path], kind: Kind) -> list[Item]:
    """Return items of given paths; of DICOM with the header of one file."""
    there = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in there]))
    inside = {path: list_plain_files(path) if path.is_dir() else [] for path in paths}
    first = {path: next(filter(is_dicom, files), path) for path, files in inside.items()}
    dicom = {item.files[0]: item for item in find_dicom(first.values())}
    named = zip(paths, read_paths(there, root, kind), strict=True)
    items = {path: replace(item, path=path) for path, item in named}
    found = {path: dicom[file] for path, file in first.items() if file in dicom}
    return [items[p].with_dicom(found[p]) if p in found else items[p] for p in paths]
