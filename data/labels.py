"""What the values of a label map mean: names, synonyms, classes, tumours. Names decide, not values.

`Labels` maps a name to the raw values that stand for it: of a data set, one entry per label that it
declares; of a network, one per class, in the order of its channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names of labels need no arrays, and `--help` no numpy
    import numpy as np
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.files import InputError, read_json

Labels = dict[str, tuple[int, ...]]

IMAGE, LABEL, PRED = "image", "label", "pred"  # dictionary keys, as in MONAI
BACKGROUND = "background"
IGNORED = 255  # class index of voxels that nobody judged: no loss and no metric counts them
LARGEST_VALUE = 65535  # of a label map
# What is assumed of label maps that nothing describes: the values of LiTS and Decathlon Task03.
USUAL_LABELS: Labels = {BACKGROUND: (0,), "liver": (1,), "tumour": (2,)}
# What is learnt by default: a tumour is liver too. The data give the values of these names.
LIVER_WITH_TUMOURS: dict[str, tuple[str, ...]] = {"liver": ("liver", "tumour")}

FOREGROUND = ("liver", "tumour")  # what must not be lost where nothing else is asked for
# Errors of the check that `--accept` takes as warnings.
ACCEPTABLE = Literal["outside", "outline", "empty", "hu", "identity", "turned", "left_right"]

# Words that mean the same; a name is compared word by word.
SYNONYMS = {
    "tumour": (
        "tumour", "tumor", "tumours", "tumors", "lesion", "lesions", "cancer", "metastasis",
        "metastases", "neoplasm", "neoplasms", "hcc", "carcinoma", "mass",
    ),
    "liver": ("liver", "livers", "hepatic", "hepar", "leber", "foie", "higado", "parenchyma"),
    BACKGROUND: ("background", "clear", "exterior", "unlabeled", "unlabelled"),
}  # fmt: skip
WORD = {word: name for name, words in SYNONYMS.items() for word in words}


def name_words(name: str) -> list[str]:
    """`"Liver_Tumor 01"` → `["liver", "tumour"]`: in small letters, without numbers, synonyms one.

    Words that run together are parted where one of the table begins the name: `livertumor02`.
    """
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    parted: list[str] = []
    for word in words:
        heads = (w for w in ("liver", "hepatic") if word.startswith(w) and word != w)
        head: str = next(heads, "")
        parted += [head, word.removeprefix(head)] if word.removeprefix(head) in WORD else [word]
    return list(dict.fromkeys(WORD.get(word, word) for word in parted if word))


def common_name(name: str) -> str:
    """The name under which synonyms meet: `Hepatic Lesion` and `livertumor02` are both `tumour`.

    Numbers count where they tell things apart that have no synonyms: `vertebra 1`, `vertebra 2`.
    """
    words = name_words(name)
    if set(words) == {"liver", "tumour"}:
        words = ["tumour"]
    if not words or not set(words) <= SYNONYMS.keys():
        words += re.findall(r"\d+", name)
    return " ".join(words) or name.strip().lower()


def is_tumour(name: str) -> bool:
    """Whether a class is a tumour by its name: many pieces, inside the organ named before it."""
    return "tumour" in name_words(name) or "metasta" in name.lower()


def find_label(name: str, labels: Iterable[str]) -> str | None:
    """The label of `labels` that `name` means: spelt the same, else in other letters, else by
    synonyms; None where none or several do."""
    names = list(labels)
    for spell in (str, str.lower, common_name):
        found = [other for other in names if spell(other) == spell(name)]
        if len(found) == 1:
            return found[0]
    return None


def find_values(words: Sequence[str], declared: Labels, setting: str) -> tuple[int, ...]:
    """Raw values of some names (or values, as numbers) of a data set's labels.

    Raises InputError, which lists what there is, for a name or value that `declared` lacks.
    """
    values: list[int] = []
    known = {value for some in declared.values() for value in some}
    for word in map(str, words):
        label = find_label(word, declared)
        if label is None and not (word.isdigit() and int(word) in known):
            raise InputError(
                f"{setting} {word}: is no label of these data, which declare "
                f"{describe_labels(declared)}; name one of them"
            )
        values += declared[label] if label is not None else [int(word)]
    return tuple(dict.fromkeys(values))


def resolve_classes(asked: Mapping[str, Sequence[str]], declared: Labels) -> Labels:
    """Class name → raw values, background first, of class name → names (or values) of labels.

    LIVER_WITH_TUMOURS, the default, takes tumours as far as the data declare them; a name that was
    asked for by hand and is not there is an error.
    """
    if dict(asked) == LIVER_WITH_TUMOURS and find_label("tumour", declared) is None:
        asked = {"liver": ("liver",)}
    classes = {name: find_values(words, declared, "--labels") for name, words in asked.items()}
    several = [v for v in list_values(classes) if sum(v in c for c in classes.values()) > 1]
    if several or 0 in list_values(classes):
        raise InputError(
            f"--labels: {describe_labels(classes)}: each label belongs to one class, and the value "
            "0 to the background; correct it"
        )
    return {BACKGROUND: (0,)} | classes


def as_labels(content: Mapping[str, int | Sequence[int]]) -> Labels:
    """Labels as they stand in JSON (a value or a list of values for each name)."""
    return {
        str(name): tuple(map(int, [v] if isinstance(v, int) else v)) for name, v in content.items()
    }


def as_plain(labels: Labels) -> dict[str, int | list[int]]:
    """`Labels` for JSON: one value as a number, several as a list."""
    return {name: v[0] if len(v) == 1 else list(v) for name, v in labels.items()}


def describe_labels(labels: Labels) -> str:
    """`background = 0, liver = 1, 2` for messages."""
    pairs = (f"{name} = {', '.join(map(str, values))}" for name, values in labels.items())
    return "; ".join(pairs)


def list_values(labels: Labels) -> list[int]:
    """All raw values that are declared, in order."""
    return sorted({value for values in labels.values() for value in values})


def group_tumours(names: Sequence[str]) -> dict[int, list[int]]:
    """Class index of each organ → those of the tumours in it, which follow it in `names`."""
    organs: dict[int, list[int]] = {}
    for index, name in enumerate(names, start=1):
        if is_tumour(name) and organs:
            organs[max(organs)].append(index)
        elif not is_tumour(name):
            organs[index] = []
    return organs


def index_classes(
    array: np.ndarray, classes: Mapping[str, Sequence[int]], ignore: Sequence[int] = ()
) -> np.ndarray:
    """Raw label values (X, Y, Z) → class indices uint8 in the order of `classes`; others are 0.

    Values of `ignore` become IGNORED: not known, neither class nor background.
    """
    import numpy as np

    table = np.zeros(max(int(array.max(initial=0)) + 1, 256), np.uint8)
    table[[value for value in ignore if value < len(table)]] = IGNORED
    for index, values in enumerate(classes.values()):
        for value in values if index else ():
            if value < len(table):
                table[value] = index
    if array.dtype != np.uint8:
        return np.take(table, array)
    order: Literal["F", "C"] = "F" if array.flags.f_contiguous else "C"
    # 8 times as fast as np.take
    content = bytearray(array.tobytes(order)).translate(table[:256].tobytes())
    return np.frombuffer(content, np.uint8).reshape(array.shape, order=order)


def translate_classes(classes: Labels, own: Labels, declared: Labels) -> Labels:
    """Classes that have the values of one data set (`own`) in the values of another one.

    Names decide, not values: liver = 1 and 2 there is liver = 6 and tumour = 7 here. Raises
    InputError where the first class after the background is not declared here.
    """
    if declared == own:
        return classes
    translated: Labels = {}
    for name, values in classes.items():
        meant = [word for word, raw in own.items() if set(raw) & set(values)]
        found = [find_label(word, declared) for word in dict.fromkeys([*meant, name])]
        translated[name] = tuple({v: 0 for label in found if label for v in declared[label]})
    translated[BACKGROUND] = (0,)
    first = list(classes)[1]
    if not translated[first]:
        raise InputError(
            f"the label maps hold {describe_labels(declared)}, none of which is {first}; use those "
            "of data that the network was made for",
            kind="values",
        )
    return translated


EXPECTED_LABELS = (
    '"labels" as Decathlon {"1": "liver", "2": "tumour"} or nnU-Net {"liver": 1, "tumour": 2} has '
    "them"
)


@dataclass
class Description:
    """What a `dataset.json` says of its label maps."""

    labels: Labels = field(default_factory=lambda: dict(USUAL_LABELS))
    ignore: tuple[int, ...] = ()  # values of voxels that nobody judged
    announced: int | None = None  # cases there should be
    path: Path | None = None


def read_description(path: Path) -> Description:
    """Labels of a `dataset.json` of Decathlon or nnU-Net (1 or 2, also with regions).

    Raises InputError with the expected form where it has another.
    """
    content = read_json(path)
    try:
        found = _read_labels(content["labels"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: must have {EXPECTED_LABELS}, got {type(error).__name__}: {error}; correct "
            "it, or remove it to use background 0, liver 1, tumour 2"
        ) from error
    ignore = tuple(v for name in list(found) if name.lower() == "ignore" for v in found.pop(name))
    labels = _name_regions(found)
    both = set(ignore) & {value for some in labels.values() for value in some}
    if both or 0 in ignore:
        raise InputError(f"{path}: {sorted(both) or 0} is to be ignored and is a label too; choose")
    if (zero := next((n for n, v in labels.items() if 0 in v), None)) is None:
        labels = {BACKGROUND: (0,)} | labels
    elif len(labels[zero]) > 1:
        raise InputError(f"{path}: {zero} must be 0 alone, got {labels[zero]}; correct it")
    announced = content.get("numTraining")
    whole = isinstance(announced, int) and not isinstance(announced, bool)
    return Description(labels, ignore, announced if whole else None, path)


def _read_labels(entries: dict[str, Any]) -> Labels:
    """Name → values of either form; several values of one name are one label."""

    def number(value: Any) -> int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{value!r} is no label value")
        if not 0 <= int(value) <= LARGEST_VALUE:
            raise ValueError(f"label values must be 0 to {LARGEST_VALUE}, got {value}")
        return int(value)

    found: dict[str, tuple[int, ...]] = {}
    by_value = all(str(key).strip().isdigit() for key in entries)
    for key, content in entries.items():
        if by_value and not isinstance(content, str):
            raise ValueError(f"the name of {key} must be a text, got {content!r}")
        listed = content if isinstance(content, list) else [content]
        values = [key] if by_value else listed
        name = str(content if by_value else key)
        found[name] = tuple(sorted({*found.get(name, ()), *map(number, values)}))
        if not found[name]:
            raise ValueError(f"{name} has no value")
    if not set(sum(found.values(), ())) - {0}:
        raise ValueError("no label beside the background")
    return found


def _name_regions(found: Labels) -> Labels:
    """Regions overlap (liver [1, 2], tumour [2]): the smallest that has a value names it."""
    owner: dict[int, str] = {}
    for name, values in sorted(found.items(), key=lambda item: len(item[1])):
        for value in values:
            if value in owner and len(found[owner[value]]) == len(values):
                raise InputError(
                    f"dataset.json: {owner[value]} and {name} both have the value {value}; each "
                    "value needs one name"
                )
            owner.setdefault(value, name)
    labels = {n: tuple(v for v in values if owner[v] == n) for n, values in found.items()}
    return {name: values for name, values in labels.items() if values}
