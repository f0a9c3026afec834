"""Names and values of labels: synonyms, classes, tumours, and the files that declare them.

Names are matched, not values. `Labels` maps a name to the raw values that stand for it: one entry
per label that a data set declares, or one per class of a network in the order of its channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import normalize

from data.files import InputError, read_json, show_path

if TYPE_CHECKING:  # names of labels need no arrays, and `--help` no numpy
    import numpy as np

Labels = dict[str, tuple[int, ...]]
Masks = tuple[tuple[str, Path], ...]  # name of a structure, its file, series or stack of PNGs

IMAGE, LABEL, PRED = "image", "label", "pred"  # dictionary keys, as in MONAI
BACKGROUND = "background"
IGNORED = 255  # class index of unannotated voxels: no loss and no metric counts them
LARGEST_VALUE = 65535  # of a label map
# What is assumed of label maps that nothing describes: the values of LiTS and Decathlon Task03.
USUAL_LABELS: Labels = {BACKGROUND: (0,), "liver": (1,), "tumour": (2,)}
# The default classes: a tumour is liver too. The data give the values of these names.
LIVER_WITH_TUMOURS: dict[str, tuple[str, ...]] = {"liver": ("liver", "tumour")}
FOREGROUND = ("liver", "tumour")  # labels that must not be lost, by default
# Errors of the check that `--accept` takes as warnings.
ACCEPTABLE = Literal["outside", "outline", "empty", "hu", "identity", "turned", "left_right"]

# Words that mean the same; a name is compared word by word.
SYNONYMS = {
    "tumour": (
        "tumour", "tumor", "tumours", "tumors", "lesion", "lesions", "cancer", "metastasis",
        "metastases", "metastasen", "neoplasm", "neoplasms", "hcc", "crlm", "carcinoma", "mass",
        "masses", "gtv", "tumoren", "tumeur", "läsion", "lésion",
    ),
    "liver": ("liver", "livers", "hepatic", "hepar", "leber", "foie", "higado", "parenchyma"),
    BACKGROUND: ("background", "clear", "exterior", "unlabeled", "unlabelled"),
}  # fmt: skip
WORD = {word: name for name, words in SYNONYMS.items() for word in words}
SAYS_NOTHING = {
    "whole", "total", "entire", "complete", "roi", "mask", "segmentation", "contour", "ai", "auto",
    "viable", "malignant", "primary",
}  # fmt: skip
RUN_TOGETHER = re.compile(rf"\b(liver|hepatic)(?=(?:{'|'.join(WORD)})\b)")  # livertumor


def name_words(name: str) -> list[str]:
    """Return the words of a name in small letters, each synonym as one word, without numbers:
    ["liver", "tumour"] of `Liver_Tumor 01` and `livertumor02`, ["liver"] of `Whole liver`."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W\d_]+", " ", normalize("NFC", name)).lower()
    words = RUN_TOGETHER.sub(r"\1 ", parted).split()
    words = [word for word in words if word not in SAYS_NOTHING] or words
    return list(dict.fromkeys(WORD.get(word, word) for word in words))


def common_name(name: str) -> str:
    """Return the name that synonyms share: `Hepatic Lesion`, `livertumor02` → `tumour`. Numbers
    count where no word has a synonym: `vertebra 1` is not `vertebra 2`."""
    words = name_words(name)
    if set(words) == {"liver", "tumour"}:
        words = ["tumour"]
    if not words or not set(words) <= SYNONYMS.keys():
        words += re.findall(r"\d+", name)
    return " ".join(words) or name.strip().lower()


def is_tumour(name: str) -> bool:
    """Return whether a name means tumours: many components, inside the organ named before them."""
    return "tumour" in name_words(name) or "metasta" in name.lower()


def find_names(name: str, labels: Iterable[str]) -> list[str]:
    """Return those of `labels` that `name` means: spelt the same, else in other letters, else its
    synonyms, as `lesion 1` and `hcc` are tumours."""
    names = list(labels)
    found = ([n for n in names if s(n) == s(name)] for s in (str, str.lower, common_name))
    return next(filter(None, found), [])


def find_label(name: str, labels: Iterable[str]) -> str | None:
    """Return the one of `labels` that `name` means; None where none or several do."""
    found = find_names(name, labels)
    return found[0] if len(found) == 1 else None


def group_tumours(names: Sequence[str]) -> dict[int, list[int]]:
    """Return the class index of each organ → those of its tumours, which follow it in `names`."""
    organs: dict[int, list[int]] = {}
    for index, name in enumerate(names, start=1):
        if is_tumour(name) and organs:
            organs[max(organs)].append(index)
        elif not is_tumour(name):
            organs[index] = []
    return organs


def as_labels(content: Mapping[str, int | Sequence[int]]) -> Labels:
    """Return `Labels` of JSON: a value or a list of values for each name."""
    return {
        str(name): tuple(map(int, [v] if isinstance(v, int) else v)) for name, v in content.items()
    }


def as_plain(labels: Labels) -> dict[str, int | list[int]]:
    """Return `Labels` for JSON: one value as a number, several as a list."""
    return {name: v[0] if len(v) == 1 else list(v) for name, v in labels.items()}


def describe_labels(labels: Labels) -> str:
    """Return `background = 0; liver = 1, 2` for messages."""
    known = {n: (*v[:3], "…", *v[-1:]) if len(v) > 20 else v for n, v in labels.items()}
    return "; ".join(f"{name} = {', '.join(map(str, v))}" for name, v in known.items())


def list_values(labels: Labels) -> list[int]:
    """Return all declared raw values in order."""
    return sorted({value for values in labels.values() for value in values})


def find_values(words: Sequence[str], declared: Labels, setting: str) -> tuple[int, ...]:
    """Return the raw values of some names (or values, as numbers) of a data set's labels."""
    values: list[int] = []
    known = {value for some in declared.values() for value in some}
    for word in map(str, words):
        labels = find_names(word, declared)
        if not labels and not (word.isdigit() and int(word) in known):
            what = f"{setting} {word}: is no label of these data,"
            raise InputError(f"{what} which declare {describe_labels(declared)}; name one of them")
        values += [v for n in labels for v in declared[n]] if labels else [int(word)]
    return tuple(dict.fromkeys(values))


def parse_words(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return name → parts of words such as `liver=liver,tumour`; NAME alone is NAME=NAME."""
    pairs = (word.partition("=") for word in words)
    return {name: tuple((values or name).split(",")) for name, _, values in pairs}


def parse_values(
    words: Sequence[str], setting: str, declared: Labels | None = None, overlap: bool = False
) -> Labels:
    """Return name → raw values of words such as `liver=1,2`, without the background. Names that
    `declared` has may stand for values; with `overlap` a value may have several names."""
    known, found = declared or {}, {}
    for name, parts in parse_words(words).items():
        word = f"{setting} {name}={','.join(parts)}"
        given = {part: (int(part),) for part in parts if part.isdecimal()}
        if not name or name.isdigit() or (declared is None and len(given) < len(parts)):
            raise InputError(f"{word}: must be NAME=VALUE or NAME=VALUE,VALUE")
        found[name] = find_values(parts, known | given, setting)
        if (label := find_label(name, known)) and not {*found[name]} & {*known[label]}:
            what = f"{word}: contradicts the data,"
            raise InputError(f"{what} which declare {describe_labels(known)}")
    found = {n: v for n, v in found.items() if v != (0,) or common_name(n) != BACKGROUND}
    values = [value for some in found.values() for value in some]
    twice = not overlap and len(values) > len(set(values))
    if twice or 0 in values or max(values, default=0) > LARGEST_VALUE:
        what = f"{setting} {' '.join(words)}: 0 is the background, and each value"
        raise InputError(f"{what} from 1 to {LARGEST_VALUE} has one name; correct it")
    return found


def resolve_classes(asked: Mapping[str, Sequence[str]], declared: Labels) -> Labels:
    """Return class name → raw values, background first, of class name → names (or values).
    LIVER_WITH_TUMOURS, the default, takes tumours only if the data declare them."""
    if dict(asked) == LIVER_WITH_TUMOURS and not find_names("tumour", declared):
        asked = {"liver": ("liver",)}
    classes = {name: find_values(words, declared, "--labels") for name, words in asked.items()}
    values = [value for some in classes.values() for value in some]
    if 0 in values or len(values) > len(set(values)):
        what = f"--labels: {describe_labels(classes)}: each label belongs to one class,"
        raise InputError(f"{what} and the value 0 to the background; correct it")
    return {BACKGROUND: (0,)} | classes


def is_label_map(array: np.ndarray) -> bool:
    """Return whether voxels are label values: whole numbers from 0 to 255, at most 32 of them."""
    import numpy as np

    in_range = array.size and array.min() >= 0 and array.max() <= 255
    values: Any = np.unique(array.astype(np.uint8))[:32] if in_range else []
    return bool(np.isin(array, values).all()) and bool(array.size)


def index_classes(
    array: np.ndarray, classes: Mapping[str, Sequence[int]], ignore: Sequence[int] = ()
) -> np.ndarray:
    """Return class indices (X, Y, Z) uint8 of raw label values, in the order of `classes`; values
    of `ignore` become IGNORED (unannotated), all others 0."""
    import numpy as np

    table = np.zeros(max(int(array.max(initial=0)) + 1, 256), np.uint8)
    table[[value for value in ignore if value < len(table)]] = IGNORED
    for index, values in enumerate(classes.values()):
        table[[value for value in values if index and value < len(table)]] = index
    return table[array]


def translate_classes(classes: Labels, own: Labels, declared: Labels) -> Labels:
    """Return classes, given in the values of one data set (`own`), in those of another one."""
    return classes if declared == own else _match_classes(classes, own, declared)


def _match_classes(classes: Labels, own: Labels, declared: Labels) -> Labels:
    """Match names: liver = 1 and 2 there is liver = 6 and tumour = 7 here. Raise InputError where
    the first class after the background is not declared here."""
    translated: Labels = {}
    for name, values in classes.items():
        meant = [word for word, raw in own.items() if set(raw) & set(values)]
        found = [n for word in dict.fromkeys([*meant, name]) for n in find_names(word, declared)]
        translated[name] = tuple({v: 0 for label in found for v in declared[label]})
    translated[BACKGROUND] = (0,)
    first = list(classes)[1]
    if not translated[first]:
        what = f"the label maps hold {describe_labels(declared)}, none of which is {first}"
        raise InputError(f"{what}; use those of data that the network was made for", kind="values")
    return translated


DESCRIBING = ("dataset.json", "datastore_v2.json")  # files; the latter is MONAI Label's


@dataclass
class Description:
    """What a file says of the values of label maps."""

    labels: Labels = field(default_factory=lambda: dict(USUAL_LABELS))
    ignore: tuple[int, ...] = ()  # values of unannotated voxels
    announced: int | None = None  # cases there should be
    path: Path | None = None  # None: the usual values are assumed


def describe(
    labels: Iterable[Path | Masks], source: Path | None = None
) -> tuple[Description, list[Path]]:
    """Return what describes label maps, and the label maps that nothing describes. The nearest of
    DESCRIBING above a label map does, up to `source`, else in two folders. It never reaches a
    neighbouring set: that has USUAL_LABELS. Segments of .seg.nrrd go by their names."""
    nearest = cache(_look)
    told: dict[str, Description] = {}
    usual, segments = list[Path](), dict[str, Description]()
    for label in labels:
        path, plain = list_paths(label)[0], isinstance(label, Path)
        inside = source and path.is_relative_to(source)
        depth = len(path.parents) - len(source.parents) if source and inside else 2
        near = next(filter(None, map(nearest, path.parents[:depth])), None)
        own = read_description(path) if plain and path.suffix.lower() == ".nrrd" else None
        told |= {show_path(near.path): near} if near and near.path and not own else {}
        segments |= {show_path(path): own} if own else {}
        usual += [path] if plain and not near and not own else []
    if usual or not (told or segments):
        place = show_path(usual[0]) if usual else ""
        told[f"{place}, which no dataset.json describes,"] = Description()
    facts: dict[str | int, object] = {}
    total = Description({}, path=next(iter((told or segments).values())).path)
    for one in told.values():
        named = {common_name(n): v for n, v in (one.labels | {"ignore": one.ignore}).items() if v}
        mine = named | {value: name for name, values in named.items() for value in values}
        if any(facts.setdefault(key, fact) != fact for key, fact in mine.items()):
            said = {describe_labels(other.labels): where for where, other in told.items()}
            differ = ", ".join(f"{where} says {text}" for text, where in said.items())
            raise InputError(f"{differ}; prepare one data set at a time, or give --values for both")
        total.labels |= {n: v for n, v in one.labels.items() if find_label(n, total.labels) is None}
        total.ignore += tuple(value for value in one.ignore if value not in total.ignore)
        if one.announced is not None:
            total.announced = (total.announced or 0) + one.announced
    for one in segments.values():
        for name in (name for name in one.labels if find_label(name, total.labels) is None):
            taken = {0, *list_values(total.labels)} if total.labels else set[int]()
            free = taken.isdisjoint(one.labels[name])
            total.labels[name] = one.labels[name] if free else (max(taken) + 1,)
    return total, usual


def describe_truths(path: Path | Masks) -> Description | None:
    """Return what describes a label map, beside it or in its header; None where nothing does."""
    described, usual = describe([path])
    return described if described.path and not usual else None


def _look(folder: Path) -> Description | None:
    """Return what a file of DESCRIBING in a folder says, if there is one."""
    files = [file for name in DESCRIBING if (file := folder / name).exists()]  # a pipe is refused
    return next(filter(None, map(read_description, files)), None)


def read_description(path: Path) -> Description | None:
    """Return what a file says of label values; None if a .nrrd or a datastore says nothing. Reads a
    `dataset.json` of Decathlon or nnU-Net (1 or 2, with regions too), the `label_info` in MONAI
    Label's `datastore_v2.json` and the segments in the header of a .nrrd (3D Slicer's)."""
    content: Any = {} if path.suffix.lower() == ".nrrd" else read_json(path)
    try:
        if path.name != "dataset.json":
            segments = list(_list_segments(path, content))
            if not segments:
                return None
            by_name = {str(n): [v for m, v in segments if m == n] for n, _ in segments}
            content = {"labels": by_name}
        found = _read_labels(content["labels"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f'{path}: must have "labels" as Decathlon {{"1": "liver"}} or nnU-Net {{"liver": 1}}, '
            f"got {type(error).__name__}: {error}; correct it, or remove it to use background 0, "
            "liver 1, tumour 2"
        ) from error
    labels, ignore = found, tuple[int, ...]()
    if "ignore" in map(str.lower, found):
        labels, ignore = part_ignored(found, str(path))
    if sum(map(len, found.values())) > len(list_values(found)):
        labels = _name_regions(labels, path)
    if (zero := next((n for n, v in labels.items() if 0 in v), None)) is None:
        labels = {BACKGROUND: (0,)} | labels
    elif len(labels[zero]) > 1:
        raise InputError(f"{path}: {zero} must be 0 alone, got {labels[zero]}; correct it")
    announced = content.get("numTraining")
    return Description(labels, ignore, announced if type(announced) is int else None, path)


def _list_segments(path: Path, content: Any) -> Iterator[tuple[str, int]]:
    """Yield (name, value) of a .nrrd's segments, or of each `label_info` within JSON."""
    if path.suffix.lower() == ".nrrd":
        with path.open("rb") as stream:
            head = re.split(rb"\r?\n\r?\n", stream.read(1 << 20))[0].decode("utf-8", "replace")
        values = dict(re.findall(r"^Segment(\d+)_LabelValue:=(\d+)", head, re.MULTILINE))
        for number, name in re.findall(r"^Segment(\d+)_Name:=(.*?)\r?$", head, re.MULTILINE):
            yield name, int(values.get(number, 1))
        return
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    for key, part in parts:
        if key == "label_info":
            yield from ((entry["name"], entry["idx"]) for entry in part)
        elif isinstance(part, dict | list):
            yield from _list_segments(path, part)


def _read_labels(entries: dict[str, Any]) -> Labels:
    """Return name → values of either form; several values of one name are one label."""
    found: dict[str, tuple[int, ...]] = {}
    by_value = all(str(key).strip().isdigit() for key in entries)
    for key, content in entries.items():
        if by_value and not isinstance(content, str):
            raise ValueError(f"the name of {key} must be a text, got {content!r}")
        name = str(content if by_value else key)
        for value in [key] if by_value else content if isinstance(content, list) else [content]:
            whole = re.fullmatch(r"(\d{1,5})(\.0)?", str(value).strip())
            if not whole or int(whole[1]) > LARGEST_VALUE:
                raise ValueError(f"label values must be 0 to {LARGEST_VALUE}, got {value!r}")
            found[name] = tuple(sorted({*found.get(name, ()), int(whole[1])}))
        if name not in found:
            raise ValueError(f"{name} has no value")
    if not set(sum(found.values(), ())) - {0}:
        raise ValueError("no label beside the background")
    return found


def part_ignored(labels: Labels, where: str) -> tuple[Labels, tuple[int, ...]]:
    """Return labels without the name "ignore", and its values: voxels that are unannotated."""
    kept = {name: values for name, values in labels.items() if name.lower() != "ignore"}
    ignore = tuple(v for name, values in labels.items() if name not in kept for v in values)
    if set(ignore) & {0, *list_values(kept)}:
        what = f"{where} ignore={','.join(map(str, ignore))}: 0 is the background, labels annotated"
        raise InputError(f"{what}; give unannotated voxels a value of their own")
    return kept, ignore


def _name_regions(found: Labels, path: Path) -> Labels:
    """Return labels that share no value: the smallest of regions (liver [1, 2], tumour [2])."""
    owner: dict[int, str] = {}
    for name, values in sorted(found.items(), key=lambda item: len(item[1])):
        for value in values:
            if value in owner and len(found[owner[value]]) == len(values):
                what = f"{path}: {owner[value]} and {name} both have the value {value}"
                raise InputError(f"{what}; each value needs one name")
            owner.setdefault(value, name)
    labels = {n: tuple(v for v in values if owner[v] == n) for n, values in found.items()}
    return {name: values for name, values in labels.items() if values}


def list_paths(label: Path | Masks | None) -> list[Path]:
    """Return the paths of a label map, or of the masks that make one."""
    return [path for _, path in label] if isinstance(label, tuple) else [label] if label else []
