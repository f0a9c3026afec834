"""The one pairing rule: a scan and a label map belong together by what remains of their names.

Steps from the surest on; each takes only what no step before took. What is ambiguous is told with
both paths and never guessed.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import InputError
from data.labels import SYNONYMS, WORD, common_name
from data.masks import Masks
from data.names import Named, kind_of, match_ends, name_case, show_path, split_words, strip_words


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
