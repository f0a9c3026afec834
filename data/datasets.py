"""Files and their names: scan or label map, what remains of a name, safe case names, listings.

The one table of words stands here; `data.layouts` pairs by what remains, apply and evaluate too.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data.dicom import (
    DicomItem,
    find_dicom,
)
from data.files import (
    InputError,
    list_below,
    list_plain_files,
    make_safe,
    natural,
    read_record,
    show_path,
)
from data.labels import (
    BACKGROUND,
    SYNONYMS,
    WORD,
    Description,
    Labels,
    common_name,
    describe_labels,
    find_label,
    list_values,
    read_description,
)
from data.scans import (
    Masks,
)
from data.seg import choose_segment_values
from data.volumes import (
    VOLUME_SUFFIXES,
    keep_volumes,
    name_case,
)

SCAN_WORDS = {
    "image", "images", "img", "imgs", "volume", "volumes", "vol", "ct", "cts", "scan", "scans",
    "dicom", "imaging", "orig", "original", "input", "inputs",
}  # fmt: skip
LABEL_WORDS = {
    "label", "labels", "lbl", "labelmap", "labelled", "labeled", "seg", "segs", "segm",
    "segmentation", "segmentations", "segmented", "mask", "masks", "truth", "truths", "ground",
    "groundtruth", "gt", "annot", "annotation", "annotations", "annotated", "outline", "outlines",
    "contour", "contours", "target", "targets", "roi", "rois", "maske", "masken", "masque",
    "masques",
}  # fmt: skip
# What says nothing beside a word of the tables: imagesTr, DICOM_anon, PATIENT_DICOM.
FILLERS = {"tr", "train", "training", "anon", "patient", "nifti", "nii"}
GLUED = re.compile(
    r"(.+?)(labels?|segmentations?|seg|masks?|truth|annotations?|outlines?)", re.IGNORECASE
)
CHANNEL = re.compile(r"_0000$")  # nnU-Net's first channel

Kind = Literal["scan", "label", ""]


def split_words(text: str) -> list[str]:
    """`TrainVolumes` → Train, Volumes; `img0001` → img, 0001; parted where a word comes out."""
    words: list[str] = []
    for piece in re.split(r"[\s_\-.,;()\[\]]+", text):
        finer = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\WA-Za-z\d]+", piece)
        glued = GLUED.fullmatch(piece)
        if kind_of([piece]) or not piece:
            words += [piece] * bool(piece)
        elif kind_of(finer) and "".join(finer) == piece:
            for told, some in itertools.groupby(finer, lambda part: bool(kind_of([part]))):
                parts = list(some)
                words += parts if told else ["".join(parts)]
        else:
            words += glued.groups() if glued else [piece]
    return words


def kind_of(words: Iterable[str]) -> Kind:
    """What the words of one name say: a label map wins over a scan (`ct_label`)."""
    small = {word.lower() for word in words}
    if small & LABEL_WORDS:
        return "label"
    return "scan" if small & SCAN_WORDS else ""


def strip_words(text: str) -> tuple[str, str]:
    """What remains of a name without the words of the tables: folded by `_`, and as it is spelt."""
    words = split_words(text)
    if not kind_of(words):
        return "_".join(words), text
    rest = [word for word in words if not kind_of([word])]
    if all(word.lower() in FILLERS for word in rest):
        rest = []
    return "_".join(rest), "_".join(rest)


@dataclass(frozen=True)
class Named:
    """A file or folder of a data set: what its whole relative path says."""

    path: Path
    kind: Kind
    parts: tuple[str, ...]  # what remains of each folder and of the file, folded; what identifies
    spelt: tuple[str, ...]  # the same, for case names
    label_folder: bool = False  # a folder, not only the file's own name, says label map

    @property
    def key(self) -> str:
        return "_".join(self.parts)


def name_files(paths: Sequence[Path], root: Path, kind: Kind = "") -> list[Named]:
    """Judge paths below `root` by their folders' and their own names; `kind` overrules.

    A folder named like a label map says nothing where names below it tell the two kinds apart. A
    file that is only called liver, or tumour, is a label map beside one that is called a scan.
    """
    split = [_components(path, root) for path in paths]
    scans = {p.parent for p in paths if kind_of(split_words(name_case(p))) == "scan"}
    kinds = [[kind_of(split_words(text)) for text in components] for components in split]
    mixed: set[tuple[str, ...]] = set()
    for components, found in zip(split, kinds, strict=True):
        if "label" in found:
            deepest = len(found) - 1 - found[::-1].index("label")
            mixed.update(tuple(components[: i + 1]) for i in range(deepest))
    named = []
    for path, components, found in zip(paths, split, kinds, strict=True):
        telling = [
            k if i == len(found) - 1 or tuple(components[: i + 1]) not in mixed else ""
            for i, k in enumerate(found)
        ]
        own = kind or kind_of(telling)  # the kinds are words of the tables themselves
        last = components[-1] if components else "0"
        if not own and path.parent in scans and last.isalpha() and common_name(last) in SYNONYMS:
            own = "label"
        rests = [strip_words(text) for text in components]
        parts, spelt = (tuple(rest[i] for rest in rests if rest[0]) for i in (0, 1))
        if rests and rests[-1][0].isdigit():  # volume-3, img0001: a number alone is no name
            spelt = (*spelt[:-1], components[-1])
        named.append(Named(path, own, parts, spelt, "label" in telling[:-1]))
    return named


def _components(path: Path, root: Path) -> list[str]:
    relative = path.relative_to(root)
    stem = CHANNEL.sub("", name_case(relative)) if relative.name else ""
    return [*relative.parts[:-1], stem] if stem else []


def name_apart(parts: Sequence[Sequence[str]]) -> list[str]:
    """A safe name for each path: its last part, and as many folders as tell it from the others."""
    taken = [1] * len(parts)
    while True:
        names = [make_safe("_".join(p[-n:])) for p, n in zip(parts, taken, strict=True)]
        groups = defaultdict(list)
        for index, name in enumerate(names):
            groups[name.casefold()].append(index)
        alike = [group for group in groups.values() if len(group) > 1]
        longer = [i for group in alike for i in group if taken[i] < len(parts[i])]
        if not longer:
            break
        for index in longer:
            taken[index] += 1
    for group in alike:  # nothing but letters' case or forbidden signs tells these apart
        for number, index in enumerate(group):
            mark = hashlib.sha256(f"{parts[index]}{number}".encode("utf-8", "replace"))
            names[index] = f"{names[index]}_{mark.hexdigest()[:6]}"
    return names


def name_scans(paths: Sequence[Path], root: Path | None = None) -> list[str]:
    """Unique safe case names: the last name, with the folders below `root` where it comes twice.

    A name that is only a word of the tables, such as ct or scan, is that of its folder below
    `root`, as prepare.py has it, unless it has such a neighbour there.
    """
    there = os.path.abspath  # a link has its own name, and may lead nowhere
    top = Path("/") if root is None else Path(there(root))
    parts, wordy = [], []
    for path in map(Path, map(there, paths)):
        inside = path.is_relative_to(top) and path != top
        folders = path.relative_to(top).parts[:-1] if inside else path.parts[1:-1]
        parts.append((*folders, name_case(path)))
        wordy.append(root is not None and inside and not strip_words(parts[-1][-1])[0])
    alone = Counter(part[:-1] for part, only in zip(parts, wordy, strict=True) if only)
    return name_apart(
        [
            part[:-1] if only and part[:-1] and alone[part[:-1]] == 1 else part
            for part, only in zip(parts, wordy, strict=True)
        ]
    )


# ---------------------------------------------------------------------------------------
# Pairs of two lists of files
# ---------------------------------------------------------------------------------------


def match_ends(wanted: Sequence[Named], offered: Sequence[Named]) -> list[list[int]]:
    """For each of `wanted` the indices of `offered` that remain the same, else those whose parts
    are the last parts of the other (`Batch 1/volume-3` and `segmentation-3`)."""
    whole, ends, tails = defaultdict(list), defaultdict(list), defaultdict(list)
    for index, other in enumerate(offered):
        whole[other.key].append(index)
        ends[other.parts].append(index)
        for first in range(1, len(other.parts)):
            tails[other.parts[first:]].append(index)
    found = []
    for one in wanted:
        same = whole.get(one.key, [])
        shorter = [i for n in range(1, len(one.parts)) for i in ends.get(one.parts[n:], [])]
        found.append(list(same) or [*shorter, *(tails.get(one.parts, []) if one.parts else [])])
    return found


def pair_by_name(scans: Sequence[Path], truths: Sequence[Path]) -> list[Path | None]:
    """The label map of each scan by what remains of their whole paths; None where there is none.

    `_0000`, `_label` and the like are left out on either side. Raises InputError where a name fits
    several, and where none fits at all.
    """
    if not scans or not truths:
        return [None] * len(scans)
    wanted, offered = (
        [
            replace(named, parts=named.parts or (name_case(named.path),))
            for named in name_files(paths, Path(os.path.commonpath([p.parent for p in paths])))
        ]
        for paths in ([p.absolute() for p in scans], [p.absolute() for p in truths])
    )
    pairs: list[Path | None] = []
    owner: dict[Path, Path] = {}
    for scan, found in zip(wanted, match_ends(wanted, offered), strict=True):
        fits = [truths[index] for index in found]
        if len(fits) > 1:
            raise InputError(
                f"{scan.path}: {' and '.join(map(show_path, fits))} are both called like it; keep "
                "one of them, or give the folders of one data set"
            )
        if fits and fits[0] in owner:
            raise InputError(
                f"{fits[0]}: {owner[fits[0]]} and {scan.path} are both called like it; rename one"
            )
        owner |= {truth: scan.path for truth in fits}
        pairs.append(fits[0] if fits else None)
    if not owner:
        raise InputError(
            f"none of {len(truths)} label maps such as {show_path(truths[0])} is called like one "
            f"of {len(scans)} scans such as {show_path(scans[0])}; rename them alike, or give one "
            "label map per scan in the same order"
        )
    return pairs


def add_once(table: dict[Any, Any], key: Any, value: Any) -> None:
    """`table[key] = value`, which must not overwrite another value."""
    if key in table and table[key] != value:
        raise InputError(f"{table[key]} and {value}: two of one name; keep or rename one of them")
    table[key] = value


@dataclass
class Fault:
    """What cannot be paired without a guess."""

    scans: list[Named]
    labels: list[Named]
    text: str


@dataclass
class Pairing:
    """Scans and label maps, and which of them were paired so far."""

    scans: list[Named]  # files and series
    labels: list[Named]  # files, series, SEGs, stacks of PNGs
    series: Collection[Path]  # which of the paths are DICOM series
    found: dict[Path, Path | Masks] = field(default_factory=dict)  # scan → its label map or masks
    faults: list[Fault] = field(default_factory=list)
    taken: set[Path] = field(default_factory=set)
    longer: defaultdict[Hashable, list[tuple[str, Named]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # see `_candidates`
    channels: int = 0  # files of nnU-Net's further channels, left out

    def run(self) -> None:
        """Pair what can be paired."""
        self._drop_channels()
        self._pair_beside_series()
        self._pair_equal_names()
        self._pair_masks()
        self._pair_by_ends()
        self._pair_only_ones()

    def free(self, named: Iterable[Named]) -> list[Named]:
        """Those that no step took so far."""
        return [one for one in named if one.path not in self.taken]

    def match(self, scan: Path, label: Path | Masks) -> None:
        """A scan and its label map belong together."""
        add_once(self.found, scan, label)
        self.taken |= {scan, *list_paths(label)}

    def tell(self, scans: Sequence[Named], labels: Sequence[Named]) -> None:
        """Several of one kind fit: a fault of the case."""
        several = labels if len(labels) > 1 else scans
        what = "label maps for one scan" if len(labels) > 1 else "scans for one label map"
        paths = " and ".join(show_path(one.path) for one in several[:6])
        text = f"{len(several)} {what}: {paths}; keep one, or tell them apart by their names"
        self.faults.append(Fault(list(scans), list(labels), text))
        self.taken |= {one.path for one in (*scans, *labels)}

    # -- steps

    def _drop_channels(self) -> None:
        """Of nnU-Net's channels the first is the CT: `x_0001` beside `x_0000` is left out."""

        def split(named: Named) -> tuple[Path, str, str]:
            stem = name_case(named.path)
            return named.path.parent, stem[:-5], stem[-5:]

        first = {split(one)[:2] for one in self.scans if split(one)[2] == "_0000"}
        kept = [
            one
            for one in self.scans
            if split(one)[:2] not in first
            or split(one)[2] == "_0000"
            or not split(one)[2].startswith("_000")
        ]
        self.channels = len(self.scans) - len(kept)
        self.scans = kept

    def _pair_beside_series(self) -> None:
        """A volume in or beside the folder of the only series there is its label map, whatever it
        is called; where there are several, the one that is called so."""
        inside = Counter(p if p.is_dir() else p.parent for p in self.series)
        beside = Counter(folder.parent for folder in inside)
        names = Counter(folder.name for folder in inside)
        lone = {name: count == 1 for name, count in names.items()}
        files = [one for one in (*self.scans, *self.labels) if one.path not in self.series]
        files = [one for one in self.free(files) if one.path.is_file()] if self.series else []
        by_folder = _group(files, lambda one: one.path.parent)
        by_name = _group(files, lambda one: name_case(one.path).removesuffix("_label"))
        for scan in self.free([one for one in self.scans if one.path in self.series]):
            folder = scan.path if scan.path.is_dir() else scan.path.parent
            if inside[folder] > 1:
                continue
            only = beside[folder.parent] == 1 and folder.parent not in inside
            near = by_folder[folder.parent]
            for group in (
                by_folder[folder],
                [one for one in by_name[folder.name] if one.path.parent == folder.parent],
                [one for one in near if agree(scan, one)] if only else [],
                [one for one in by_name[folder.name] if one.kind != "label" and lone[folder.name]],
            ):
                group = self.free(group)
                worded = [n for n in group if kind_of(split_words(name_case(n.path))) == "label"]
                group = worded or group
                if len(group) == 1:
                    self.match(scan.path, group[0].path)
                elif group and not are_masks([(n.parts[-1] if n.parts else "", n) for n in group]):
                    self.tell([scan], group)
                if group:
                    break

    def _pair_equal_names(self) -> None:
        """What remains of the whole path is the same."""
        scans, labels = (
            _group(self.free(named), lambda one: one.key) for named in (self.scans, self.labels)
        )
        for key in scans.keys() & labels.keys():
            worded = [one for one in scans[key] if one.kind == "scan"]
            some = worded or scans[key]  # what has no word beside a `ct` is another picture
            several = some[0].path in self.series and len(self._candidates(some[0])) > 1
            if several and len(some) == 1:
                continue  # masks of structures beside a series' whole label map: 3D-IRCADb
            if len(some) == len(labels[key]) == 1:
                self.match(some[0].path, labels[key][0].path)
            else:
                self.tell(some, labels[key])

    def _candidates(self, scan: Named) -> list[tuple[str, Named]]:
        """(structure, label map) of those called like the scan and one thing more: `p1/ct` and
        `p1/liver_mask`, `p1_ct` and `p1_tumor_seg`."""
        if not self.longer:
            for label in (one for one in self.labels if one.parts):
                *folders, last = label.parts
                self.longer[tuple(folders)].append((last, label))
                words = last.split("_")
                known = [*itertools.takewhile(lambda word: word.lower() in WORD, words[::-1])][::-1]
                if known and len(known) < len(words):
                    rest = "_".join(words[: -len(known)])
                    self.longer[(*folders, rest)].append(("_".join(known), label))
        return self.longer.get(scan.parts, [])

    def _pair_masks(self) -> None:
        """A file, series or stack for each structure: TotalSegmentator, 3D-IRCADb."""
        for scan in self.free(self.scans):
            fits = [fit for fit in self._candidates(scan) if fit[1].path not in self.taken]
            if len(fits) > 1 and are_masks(fits):
                self.match(scan.path, tuple((name, label.path) for name, label in fits))
            elif len(fits) > 1:
                self.tell([scan], [label for _, label in fits])
            elif fits:
                ((name, label),) = fits
                self.match(scan.path, ((name, label.path),) if label.path.is_dir() else label.path)

    def _pair_by_ends(self) -> None:
        """The last parts are the same: `Training Batch 1/volume-3`, `segmentation-3`."""
        scans, labels = self.free(self.scans), self.free(self.labels)
        matches = match_ends(labels, scans)
        owners: dict[int, list[Named]] = defaultdict(list)
        for label, found in zip(labels, matches, strict=True):
            for index in found:
                owners[index].append(label)
        for label, found in zip(labels, matches, strict=True):
            if len(found) > 1:
                self.tell([scans[index] for index in found], [label])
            elif found and len(owners[found[0]]) == 1:
                self.match(scans[found[0]].path, label.path)
            elif found and label is owners[found[0]][0]:
                self.tell([scans[found[0]]], owners[found[0]])

    def _pair_only_ones(self) -> None:
        """The only scan and the only label map of one folder, unless their names disagree."""
        scans, labels = (
            _group(named, lambda one: one.path.parent) for named in (self.scans, self.labels)
        )
        for folder in scans.keys() & labels.keys():
            both = [*scans[folder], *labels[folder]]
            if len(both) == len(self.free(both)) == 2 and agree(*both):
                self.match(both[0].path, both[1].path)


def agree(scan: Named, label: Named) -> bool:
    """Whether the own names of two neighbours allow that they are one patient's: one of them says
    nothing, or the label map's only names a structure (`portal`, `liver_seg`)."""
    own, other = (strip_words(name_case(one.path))[0] for one in (scan, label))
    structure = all(word.lower() in WORD for word in other.split("_"))
    return not own or not other or own == other or structure


def are_masks(fits: Sequence[tuple[str, Named]]) -> bool:
    """Whether label maps are masks of several structures: a folder of them, or known names."""
    names = {name for name, _ in fits}
    if len(names) < len(fits):
        return False
    known = [set(common_name(name).split()) <= SYNONYMS.keys() for name in names]
    return all(known) or all(label.label_folder for _, label in fits)


def list_paths(label: Path | Masks | None) -> list[Path]:
    """The paths of a label map, or of the masks that make one."""
    if label is None:
        return []
    return [path for _, path in label] if isinstance(label, tuple) else [label]


def _group(
    named: Iterable[Named], key: Callable[[Named], Hashable]
) -> defaultdict[Hashable, list[Named]]:
    groups: defaultdict[Hashable, list[Named]] = defaultdict(list)
    for one in named:
        groups[key(one)].append(one)
    return groups


EXPECTED = (
    "a scan and a label map that are told apart by words such as images / labels, volume / "
    "segmentation, ct / mask in the names of folders or files and are otherwise called alike; "
    "DICOM series with DICOM SEG, NIfTI label maps, MASKS_DICOM or Ground; or name two folders: "
    "--images FOLDER --labels FOLDER"
)


@dataclass
class DataSet:
    """What was recognised below a folder."""

    layout: str
    cases: list[Case]
    declared: Labels  # label name → raw values that its label maps may hold
    ignore: tuple[int, ...] = ()  # raw values of voxels that nobody judged
    unused: list[Path] = field(default_factory=list)
    announced: int | None = None  # cases that dataset.json says there are
    notes: list[str] = field(default_factory=list)
    source: Path = Path()


def find_pairs(
    source: Path,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    exclude: Path | None = None,
    values: Labels | None = None,
) -> DataSet:
    """The cases of a data set, in natural order of their names, and what its labels are called.

    Args:
        images, labels: folders of the scans and of the label maps, where names do not tell.
        exclude: folder below `source` that is not looked into.
        values: label names and values as the user gives them; they replace the data's own.

    Raises InputError with what was expected where there is no pair.
    """
    if (images is None) != (labels is None):
        raise InputError("--images and --labels: give both folders, or neither")
    source = source.absolute()
    search = Search(source, exclude.absolute() if exclude else None)
    if images is None or labels is None:
        search.look(source)
    else:
        search.look(images.absolute(), "scan")
        search.look(labels.absolute(), "label")
    cases = search.pair()
    if not any(case.faults or (case.image and case.label) for case in cases):
        raise InputError(
            f"{show_path(source)}: no scans with label maps found among {len(search.files)} files; "
            f"expected {EXPECTED}"
        )
    data = DataSet(search.layout, cases, {}, source=source, notes=search.notes)
    used = {p for case in cases for p in (case.image, *list_paths(case.label)) if p is not None}
    data.unused = [named.path for named in search.seen if named.path not in used]
    search.declare(data, used, values)
    return data


def find_own(files: Sequence[Path]) -> dict[Path, list[str]]:
    """Folders of cases that this program wrote, and what it wrote of each result."""
    marks = [file for file in files if file.name in ("case.json", f"{file.parent.name}.json")]
    records = {mark.parent: read_record(mark) or {} for mark in marks}
    return {folder: list(record.get("files", ())) for folder, record in records.items() if record}


@dataclass
class Search:
    """What `find_pairs` has found so far below `source`."""

    source: Path
    exclude: Path | None
    files: list[Path] = field(default_factory=list)
    scans: list[Named] = field(default_factory=list)
    labels: list[Named] = field(default_factory=list)
    seen: list[Named] = field(default_factory=list)  # volumes, series and SEGs, used or not
    series: dict[Path, DicomItem] = field(default_factory=dict)  # by the path to read it by
    segs: list[DicomItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layout: str = ""

    # -- what there is

    def look(self, root: Path, kind: Kind = "") -> None:
        """Add the volumes, series, SEGs and stacks of pictures below `root`."""
        if not root.is_dir():
            raise InputError(f"{show_path(root)}: no such folder; give the one with the scans")
        files = list_below(root, self.exclude)
        if kind == "label":
            files = self.choose_drafts(files)
        elif not kind:
            files = self.leave_own(files)
        volumes = keep_volumes(files)
        known = set(volumes)
        items = find_dicom([f for f in files if f not in known and f.suffix.lower() != ".png"])
        self.files += files
        series = {item.path: item for item in items if not item.is_seg and not item.fault}
        self.series |= series
        self.segs += [item for item in items if item.is_seg]
        self.notes += [f"cannot be used: {item.fault}" for item in items if item.fault]
        stacks = {file.parent for file in files if file.suffix.lower() == ".png"}
        for one in name_files([*volumes, *series, *sorted(stacks - series.keys())], root, kind):
            if one.path in stacks and one.kind != "label":
                continue  # pictures of anything
            self.seen += [one] * (one.path not in stacks)
            if any("Ts" in split_words(part) for part in one.path.relative_to(root).parts[:-1]):
                continue  # imagesTs, labelsTs: the test cases of a challenge
            (self.labels if one.kind == "label" else self.scans).append(one)

    def leave_own(self, files: Sequence[Path]) -> list[Path]:
        """Files but those of cases that this program prepared or segmented: they are no data set,
        and label maps that a network made would pass for drawn ones. Says so."""
        if own := find_own(files):
            self.notes.append(
                f"left out: {len(own)} cases that this program wrote, such as {show_path(min(own))}"
            )
        return [file for file in files if file.parent not in own]

    def choose_drafts(self, files: Sequence[Path]) -> list[Path]:
        """Of a folder named for its label maps, without what was written beside a network's."""
        written = {folder / name for folder, names in find_own(files).items() for name in names}
        drafts = {file for file in written if file.name == f"{file.parent.name}_label.nii.gz"}
        if drafts:
            self.notes.append(
                f"{len(drafts)} label maps are drafts of a network, such as "
                f"{show_path(min(drafts))}: were they corrected?"
            )
        return [file for file in files if file not in written - drafts]

    def _name_layout(self, pairing: Pairing) -> str:
        folders = {part for named in self.seen for part in named.path.parts[:-1]}
        stems = [name_case(path).partition("-") for path in pairing.found]
        if self.series:
            return "dicom"
        if {"imagesTr", "labelsTr"} <= folders:
            return "decathlon"
        if stems and all(first == "volume" and dash for first, dash, _ in stems):
            return "lits"
        masks = any(isinstance(label, tuple) for label in pairing.found.values())
        return "a mask per structure" if masks else "images and labels by name"

    # -- pairs

    def pair(self) -> list[Case]:
        """The cases, in natural order of their names; those without partner have None."""
        pairing = Pairing(self.scans, self.labels, self.series.keys())
        self._pair_segs(pairing)
        pairing.run()
        self.layout = self._name_layout(pairing)
        if pairing.channels:
            self.notes.append(f"{pairing.channels} further channels (_0001 …) are not used")
        return self._make_cases(pairing)

    def _pair_segs(self, pairing: Pairing) -> None:
        """A SEG belongs to the series that it names, else to the only one of its folder, or of the
        folder above."""
        scans = {named.path: named for named in (*self.scans, *self.labels)}
        by_uid, by_folder, wanted = defaultdict(list), defaultdict(list), defaultdict(list)
        for path, item in self.series.items():
            by_uid[item.uid].append(path)
            folder = path if path.is_dir() else path.parent
            for above in (folder, folder.parent, folder.parent.parent):
                by_folder[above].append(path)
        for seg in self.segs:
            root = self.source if seg.path.is_relative_to(self.source) else seg.path.parent
            (named,) = name_files([seg.path], root, "label")
            self.seen.append(named)
            near = by_uid.get(seg.uid, []) if seg.uid else []
            if not seg.uid:
                near = by_folder[seg.path.parent] or by_folder[seg.path.parent.parent]
            if len(near) == 1:
                wanted[near[0]].append(named)
            elif near:
                pairing.tell([scans[path] for path in near], [named])
            else:
                pairing.labels.append(named)
        for path, several in wanted.items():
            if len(several) == 1 and path not in pairing.taken:
                pairing.match(path, several[0].path)
            else:
                pairing.tell([scans[path]], several)

    def _make_cases(self, pairing: Pairing) -> list[Case]:
        """Cases of pairs, of faults and of what stayed alone, each with a name of its own."""
        entries: list[tuple[Named, Path | None, Path | Masks | None, str]] = [
            (named, named.path, pairing.found[named.path], "")
            for named in (*pairing.scans, *pairing.labels)
            if named.path in pairing.found
        ]
        worded = any(named.kind == "scan" for named, *_ in entries)
        for scan in pairing.free(pairing.scans):
            if scan.path in self.series:
                count = self.series[scan.path].images
                self.notes.append(
                    f"not used: {show_path(scan.path)}, a series of {count} images without a label "
                    "map"
                )
            elif not self.series and (scan.kind == "scan" or not worded) and not is_test(scan):
                entries.append((scan, scan.path, None, ""))
        for fault in pairing.faults:
            first = (fault.scans or fault.labels)[0]
            image = fault.scans[0].path if fault.scans else None
            entries.append((first, image, fault.labels[0].path, fault.text))
        alone = [n for n in pairing.free(pairing.labels) if n.path.is_file()]
        entries += [(n, None, n.path, "") for n in alone if n.path not in self.series]
        parts = [self._spell(named) for named, *_ in entries]
        names = name_apart(parts)
        if longer := [n for n, p in zip(names, parts, strict=True) if n != make_safe(p[-1])]:
            self.notes.append(
                f"{len(longer)} cases are told apart by their folders, such as {longer[0]}; where "
                "a folder is a patient with several scans, name the patients: --patient-pattern"
            )
        patients: dict[str, str] = {}
        cases = []
        for name, (named, image, label, wrong) in sorted(
            zip(names, entries, strict=True), key=lambda pair: natural(pair[0])
        ):
            item = self.series.get(named.path)
            patient = patients.setdefault(item.patient, name) if item and item.patient else name
            faults = [wrong] * bool(wrong) + _find_bad_names([image, *list_paths(label)])
            cases.append(Case(name, patient, image, label, tuple(faults)))
        return cases

    def _spell(self, named: Named) -> tuple[str, ...]:
        """Parts of a case's name: what remains of its path; where nothing does, its folder."""
        if named.path in self.series and named.path.is_file():  # shares its folder with others
            digest = hashlib.sha256(self.series[named.path].uid.encode()).hexdigest()[:10]
            return (*named.spelt[:-1], f"series_{digest}")
        if self.layout == "lits":
            return (*named.spelt[:-1], "volume-" + name_case(named.path).partition("-")[2])
        folder = named.path if named.path.is_dir() else named.path.parent
        return named.spelt or (folder.name or "case",)

    # -- names of the labels

    def declare(self, data: DataSet, used: set[Path], values: Labels | None) -> None:
        """Set what the labels are called: by the user, by dataset.json, by SEGs and masks."""
        if values:
            data.ignore = tuple(v for n in values if n.lower() == "ignore" for v in values[n])
            if 0 in data.ignore:
                raise InputError("--values ignore=0: 0 is the background; give what nobody judged")
            data.declared = {n: v for n, v in values.items() if n.lower() != "ignore"}
            if 0 not in list_values(values):
                data.declared = {BACKGROUND: (0,)} | data.declared
            return
        described: Description = find_description(self.files, used, self.source)
        data.declared, data.ignore = described.labels, described.ignore
        data.announced = described.announced
        self._declare_segments(data, used)
        if described.path is None:
            self._declare_masks(data)

    def _declare_segments(self, data: DataSet, used: set[Path]) -> None:
        """Declare the segments of the SEGs that nothing names so far."""
        numbers: dict[str, int] = {}
        for seg in self.segs:
            for name, number in seg.segments.items() if seg.path in used else ():
                if find_label(name, numbers) is None:
                    numbers[name] = number
        chosen = choose_segment_values(numbers, data.declared)
        if chosen:
            told = ", ".join(f"{name} = {value}" for name, value in chosen.items())
            data.notes.append(f"label values of the DICOM SEGs, by segment names: {told}")
        more = {n: (v,) for n, v in chosen.items() if find_label(n, data.declared) is None}
        data.declared = data.declared | more

    def _declare_masks(self, data: DataSet) -> None:
        """Liver and tumours of masks have the usual values; where there are none, every one has."""
        masks = [case.label for case in data.cases if isinstance(case.label, tuple)]
        names = sorted({name for label in masks for name, _ in label}, key=natural)
        others = [name for name in names if find_label(name, data.declared) is None]
        if names and len(others) == len(names):
            data.declared = {BACKGROUND: (0,), **{n: (i,) for i, n in enumerate(names, 1)}}
        elif others:
            told = ", ".join(others[:6]) + " …" * (len(others) > 6)
            data.notes.append(
                f"masks of {len(others)} other structures are not used ({told}); name those you "
                "want: --values liver=1 spleen=2"
            )


def is_test(named: Named) -> bool:
    """Whether a scan belongs to the test cases of a challenge, whose label maps nobody has."""
    words = {word.lower() for part in named.parts for word in part.split("_")}
    return bool(words & {"test", "testing"})


def _find_bad_names(paths: Sequence[Path | None]) -> list[str]:
    bad = [path for path in paths if path is not None and show_path(path) != str(path)]
    return [f"{show_path(path)}: its name is not UTF-8; rename it" for path in bad]


# ---------------------------------------------------------------------------------------
# The listing
# ---------------------------------------------------------------------------------------


def describe_data_set(data: DataSet) -> list[str]:
    """The first lines that a user sees: layout, three pairs, labels, what is unclear or unused."""

    def short(path: Path) -> str:
        inside = path.is_relative_to(data.source)
        return show_path(path.relative_to(data.source) if inside else path)

    pairs = [c for c in data.cases if c.image and c.label and not c.faults]
    lines = [f"{show_path(data.source)}: layout {data.layout}, {len(pairs)} scans with label maps"]
    for case in pairs[:3]:
        paths = list_paths(case.label)
        more = f" and {len(paths) - 1} masks more" if len(paths) > 1 else ""
        lines.append(f"  {case.name}: {short(case.image or paths[0])} + {short(paths[0])}{more}")
    lines += [f"  and {len(pairs) - 3} more"] * (len(pairs) > 3)
    lines.append(f"labels: {describe_labels(data.declared)}")
    if data.ignore:
        lines.append(f"not judged: voxels of {', '.join(map(str, data.ignore))}")
    lines += [f"unclear: {case.name}: {fault}" for case in data.cases for fault in case.faults]
    if data.announced not in (None, len(pairs)):
        lines.append(
            f"warning: dataset.json announces {data.announced} cases; download what is missing"
        )
    if data.unused:
        example = show_path(data.unused[0])
        lines.append(f"not used: {len(data.unused)} other volumes, such as {example}")
    return lines + data.notes


@dataclass
class Case:
    """One scan and its label map; None where one is missing."""

    name: str
    patient: str
    image: Path | None
    label: Path | Masks | None = None  # or (name, mask) of each structure
    faults: tuple[str, ...] = ()  # why it cannot be used: what is ambiguous, with both paths
    described: Description | None = None  # what the label map's values mean, if its data say so
    trust_grid: bool = False  # lay the label map on the scan voxel by voxel
    modality: str = ""
    warnings: tuple[str, ...] = ()  # of prepare.py, accepted findings too
    accepted: tuple[str, ...] = ()  # kinds of findings that prepare.py was told to accept
    drawn: tuple[int, int] = (0, 1)  # an annotated slice (RAS); every n-th one is
    alone: bool = True  # no other case beside it


# ---------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------


def find_scans(path: Path) -> list[Path]:
    """The scans that a path stands for: a file, or a folder's volumes and the DICOM series in and
    below it, each series once. Raises InputError where there is none."""
    if not path.is_dir():
        return [path]
    try:
        files = list_plain_files(path)
        items = find_dicom(list_below(path))
    except OSError as error:
        raise InputError(f"{show_path(path)}: cannot be read ({error.strerror})") from error
    series = [item.path for item in items if not item.is_seg and not item.fault]
    here = any(item == path or (item.parent == path and item.is_file()) for item in series)
    volumes = [] if here else keep_volumes(files)  # a label map may lie beside a series' slices
    if volumes + series:
        return volumes + sorted(series)
    if faults := [item.fault for item in items if item.fault]:
        raise InputError(f"{show_path(path)}: holds no scan that can be read; {faults[0]}")
    what = "holds only DICOM SEGs, no scan" if items else "holds no scan"
    raise InputError(
        f"{show_path(path)}: {what}; expected {', '.join(VOLUME_SUFFIXES)} files or DICOM series"
    )


# ---------------------------------------------------------------------------------------
# Truths: which belongs to which, and what their values mean
# ---------------------------------------------------------------------------------------


def find_labels(path: Path) -> list[Path]:
    """The label maps that a path stands for: those of apply_model.py's results, or any volumes."""
    return sorted(path.glob("*/*_label.nii.gz")) or find_scans(path)


def pair_truths(scans: Sequence[Path], truth: Sequence[Path]) -> list[Path | None]:
    """A label map for each scan: of a folder the one of equal name, else one by one."""
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


def list_cases(paths: Sequence[Path], truth: Sequence[Path]) -> list[Case]:
    """Return the scans that some paths stand for, each under a name of its own, with their truths.

    Raises InputError for no path, for a scan that is given twice, or truths that do not fit.
    """
    if not paths:
        raise InputError("nothing to segment: give CT volumes, or --split test")
    scans = [scan for path in paths for scan in find_scans(path)]
    if twice := [scan for scan, n in Counter(map(os.path.realpath, scans)).items() if n > 1]:
        raise InputError(f"{twice[0]}: is given twice; give each scan once")
    names = name_scans(scans, paths[0] if len(paths) == 1 else None)
    return [
        Case(
            name, name, scan, label, described=None if label is None else describe_truths(label),
            alone=len(scans) == 1,
        )
        for name, scan, label in zip(names, scans, pair_truths(scans, truth), strict=True)
    ]  # fmt: skip


def describe_truths(path: Path | Masks) -> Description | None:
    """What the `dataset.json` beside a label map or its folder says; None where there is none."""
    path = path if isinstance(path, Path) else path[0][1]
    folders = [path, *path.parents[:2]] if path.is_dir() else path.parents[:2]
    found = (folder / "dataset.json" for folder in folders)
    file = next((file for file in found if file.is_file()), None)
    return None if file is None else read_description(file)


def find_description(files: Iterable[Path], cases: Iterable[Path], root: Path) -> Description:
    """The description that is nearest to the files of the cases, up to `root`; else any one.

    Raises InputError naming two that differ.
    """
    known = {path.parent: path for path in files if path.name == "dataset.json"}
    used: dict[Path, None] = {}
    for folder in {path.parent for path in cases} if known else ():
        near = next((known[up] for up in (folder, *folder.parents) if up in known), None)
        if near is not None:
            used[near] = None
    read = [read_description(path) for path in sorted(used or known.values())]
    for other in read[1:]:
        if (other.labels, other.ignore) != (read[0].labels, read[0].ignore):
            raise InputError(
                f"{read[0].path} says {describe_labels(read[0].labels)}, {other.path} says "
                f"{describe_labels(other.labels)}; prepare one data set at a time, or give "
                "--values for both"
            )
    if not read:
        return Description()
    counts = [one.announced for one in read if one.announced is not None]
    read[0].announced = sum(counts) if counts else None
    return read[0]
