"""Any data set as it lies on disk: which files are scans and label maps, and what they are called.

One rule: a word in a folder's or a file's name says what it is (the table is in `data.names`), and
what remains of the whole path below the source pairs them (`data.pairing`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.cases import Case
from data.descriptions import Description, find_description, read_patients, read_split
from data.destination import read_record
from data.dicom import DicomItem, choose_segment_values, find_dicom
from data.files import InputError
from data.labels import BACKGROUND, Labels, describe_labels, find_label, list_values
from data.masks import Masks
from data.names import (
    Kind,
    Named,
    keep_volumes,
    list_below,
    make_safe,
    name_apart,
    name_case,
    name_files,
    natural,
    show_path,
    split_words,
)
from data.pairing import Pairing, add_once, list_paths

__all__ = [
    "DataSet", "add_once", "describe_data_set", "find_pairs", "read_patients", "read_split",
]  # fmt: skip

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
    records = {mark.parent: read_record(mark) for mark in marks}
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
