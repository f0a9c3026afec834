"""Files and their names: scan or label map, what remains of a name, safe case names, listings.

The one table of words stands here; `data.layouts` pairs by what remains, apply and evaluate too.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data.files import InputError
from data.labels import SYNONYMS, common_name
from data.volumes import VOLUME_SUFFIXES, has_suffix

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
LONGEST = 100  # letters of a case name; file systems allow 255 bytes with what is added

Kind = Literal["scan", "label", ""]


def name_case(path: Path) -> str:
    """`liver_3` for `…/liver_3.nii.gz`; the folder's own name for a DICOM folder."""
    name = path.name
    known = [s for s in (*VOLUME_SUFFIXES, ".dcm") if name.lower().endswith(s)]
    return name[: len(name) - len(max(known, key=len, default=""))]


def show_path(path: Path) -> str:
    """A path that can be printed, also where its name is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


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


# ---------------------------------------------------------------------------------------
# Case names
# ---------------------------------------------------------------------------------------


def make_safe(text: str) -> str:
    """A case name that every file system and spreadsheet takes as a name, and nothing else."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", text).strip().lstrip(".=+-@ ").rstrip(". ")
    text = re.sub(r"\.{2,}", ".", text)
    if len(text.encode()) > LONGEST:
        mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = text.encode()[: LONGEST - 9].decode("utf-8", "ignore") + "_" + mark
    return text or "case"


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


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorting key: liver_2 before liver_10."""
    return [(t.isdecimal(), int(t) if t.isdecimal() else 0, t) for t in re.split(r"(\d+)", name)]


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


# ---------------------------------------------------------------------------------------
# Lists of files
# ---------------------------------------------------------------------------------------


def list_plain_files(folder: Path) -> list[Path]:
    """What is not hidden in a folder, nor a folder, in the order of the names.

    Links that lead nowhere too, so that whoever reads them names them.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and not _is_folder(e)]
    return [folder / name for name in sorted(names)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_below(folder: Path, exclude: Path | None = None) -> list[Path]:
    """All files, also through links, each folder listed once; hidden ones (macOS leaves
    `._x.nii`) and `exclude` are not."""

    def refuse(error: OSError) -> None:  # what cannot be listed must not be missing silently
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); ask its owner")

    files: list[Path] = []
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            subfolders.clear()
            continue
        seen.add(real)
        kept = (n for n in sorted(subfolders) if not n.startswith("."))
        subfolders[:] = [n for n in kept if Path(place, n) != exclude]
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return files


def keep_volumes(files: Sequence[Path]) -> list[Path]:
    """The volume files among some, a header and its voxels once."""
    there = {str(file).lower() for file in files}

    def is_voxels(file: Path) -> bool:
        head, _, end = str(file).lower().rpartition(".img")
        return end in ("", ".gz") and any(f"{head}.hdr{e}" in there for e in ("", ".gz"))

    volumes = [file for file in files if has_suffix(file, VOLUME_SUFFIXES)]
    return [f for f in volumes if not (".img" in f.name.lower() and is_voxels(f))]


def list_pair(path: Path) -> list[Path]:
    """Header and voxels of an Analyze or NIfTI pair, whichever of them was named."""
    stem, kind, packed = re.split(r"(hdr|img)", path.name, flags=re.IGNORECASE)[-3:]
    stem = path.name[: len(path.name) - len(kind + packed)]
    header, voxels = ("HDR", "IMG") if kind.isupper() else ("hdr", "img")
    others = [f"{stem}{one}{end}" for one in (header, voxels) for end in ("", ".gz", ".GZ")]
    found = [path, *(path.with_name(n) for n in others if n != path.name)]
    return [file for file in found if file == path or file.is_file()]


def list_data_files(header: Path) -> list[Path]:
    """Files that hold the voxels of a .mhd or .nhdr, as its text names them."""
    text = header.read_bytes()[: 1 << 20].decode("latin-1")
    found = re.search(
        r"^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(.*?)\s*$",
        text,
        re.MULTILINE | re.IGNORECASE,
    )
    if found is None or found[1].upper() == "LOCAL":
        return []
    names = [found[1]]
    if found[1].upper().startswith("LIST"):
        names = [line.strip() for line in text[found.end() :].splitlines() if line.strip()]
    elif pattern := re.fullmatch(r"(\S*%\d*d\S*)((?:\s+-?\d+)*)", found[1]):
        first, last, step = [*map(int, pattern[2].split()), 1, 1, 1][:3]
        names = [pattern[1] % number for number in range(first, last + 1, max(step, 1))]
    return [file for name in names if (file := header.parent / name).is_file()]
