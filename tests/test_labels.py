"""Names decide what a value means: synonyms, classes, tumours, values."""

from __future__ import annotations

import numpy as np
import pytest

from data.files import InputError
from data.labels import (
    IGNORED,
    LIVER_WITH_TUMOURS,
    USUAL_LABELS,
    as_labels,
    as_plain,
    describe_labels,
    find_label,
    find_values,
    group_tumours,
    index_classes,
    is_tumour,
    parse_values,
    parse_words,
    resolve_classes,
)

BTCV = {
    "background": (0,), "spleen": (1,), "right kidney": (2,), "left kidney": (3,), "liver": (6,),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("liver", "liver"), ("Liver", "liver"), ("LIVER_1", "liver"), ("hepatic", "liver"),
        ("Leber", "liver"), ("foie", "liver"), ("tumour", "tumour"), ("Tumor", "tumour"),
        ("Liver Tumor", "tumour"), ("livertumor02", "tumour"), ("liver_lesions", "tumour"),
        ("HepaticLesion", "tumour"), ("cancer", "tumour"), ("Metastasis", "tumour"),
        ("HCC", "tumour"), ("clear", "background"), ("unlabelled", "background"),
        ("livertumors", "tumour"), ("LiverMass", "tumour"), ("liver vessel", None),
        ("Whole liver", "liver"), ("Liver (total)", "liver"), ("liver ROI", "liver"),
        ("spleen", None), ("left kidney", None), ("livery", None), ("", None),
    ],
)  # fmt: skip
def test_synonyms_meet_under_one_name(name, label):
    assert find_label(name, USUAL_LABELS) == label


@pytest.mark.parametrize(
    ("name", "labels", "found"),
    [
        ("liver", ["Liver", "liver"], "liver"),  # spelt the same wins
        ("LIVER", ["Liver", "hepatic"], "Liver"),  # then other letters
        ("tumor", ["lesion", "cancer"], None),  # two of one meaning: nothing is guessed
        ("vertebra 1", ["vertebra 2"], None),  # numbers tell apart what has no synonym
        ("vertebra_1", ["vertebra 2", "Vertebra 1"], "Vertebra 1"),
        ("label 3", ["label 4"], None),
        ("left kidney", ["right kidney"], None),
        ("kidney tumor", ["tumour"], None),  # another organ's
    ],
)
def test_a_name_means_one_label_or_none(name, labels, found):
    assert find_label(name, labels) == found


def test_tumours_are_known_by_their_names():
    names = ["liver", "Hepatic Lesion", "livertumor01", "spleen", "hcc", "metastatic spots"]
    assert [is_tumour(name) for name in names] == [False, True, True, False, True, True]
    assert group_tumours(["liver", "tumour", "cancer", "spleen"]) == {1: [2, 3], 4: []}
    assert group_tumours(["tumour", "liver"]) == {2: []}


@pytest.mark.parametrize(
    ("declared", "classes"),
    [
        (USUAL_LABELS, {"background": (0,), "liver": (1, 2)}),
        (BTCV, {"background": (0,), "liver": (6,)}),  # spleen and kidney are no liver
        (
            {"background": (0,), "tumour": (1,), "liver": (2,)},
            {"background": (0,), "liver": (2, 1)},
        ),
        ({"clear": (0,), "Leber": (3, 4), "HCC": (9,)}, {"background": (0,), "liver": (3, 4, 9)}),
        ({"liver": (1,), "hcc": (2,), "Lesion 2": (4,)}, {"background": (0,), "liver": (1, 2, 4)}),
    ],
)
def test_the_default_learns_the_liver_of_any_data(declared, classes):
    assert resolve_classes(LIVER_WITH_TUMOURS, declared) == classes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"spleen": ("spleen",)}, "spleen: is no label of these data, which declare background"),
        ({"liver": ("7",)}, "7: is no label"),
        ({"liver": ("liver", "tumour", "cyst")}, "cyst: is no label"),
        ({"a": ("liver",), "b": ("1",)}, "each label belongs to one class"),
        ({"a": ("background",)}, "0 to the background"),
    ],
)
def test_a_class_that_the_data_lack_is_an_error(asked, message):
    with pytest.raises(InputError, match=message):
        resolve_classes(asked, USUAL_LABELS)


def test_values_are_found_by_name_synonym_or_number():
    assert find_values(("liver", "lesion"), USUAL_LABELS, "--foreground") == (1, 2)
    assert find_values(("6", "liver"), BTCV, "--foreground") == (6,)
    assert find_values((2,), USUAL_LABELS, "--foreground") == (2,)
    with pytest.raises(InputError, match="liver = 6"):
        find_values(("4",), BTCV, "--foreground")


def test_labels_stand_in_json_as_values_or_lists():
    labels = {"background": (0,), "liver": (1, 2)}
    assert as_plain(labels) == {"background": 0, "liver": [1, 2]}
    assert as_labels(as_plain(labels)) == labels
    assert describe_labels(labels) == "background = 0; liver = 1, 2"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, ">i2"])
def test_values_become_class_indices(dtype, order):
    raw = np.asarray(np.arange(120).reshape(5, 6, 4), dtype, order=order)
    indices = index_classes(
        raw, {"background": (0,), "liver": (6, 1), "tumour": (2,)}, (100, 70000)
    )
    expected = np.zeros((5, 6, 4))
    expected[0, 0, 1], expected[0, 0, 2], expected[0, 1, 2], expected[4, 1, 0] = 1, 2, 1, IGNORED
    assert indices.dtype == np.uint8
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("liver",), "must be NAME=VALUE"),
        (("=1",), "must be NAME=VALUE"),
        (("liver=x",), "must be NAME=VALUE"),
        (("a=1", "b=1"), "has one name"),
        (("a=70000",), "has one name"),
        (("liver=1", "ignore=0"), "0 is the background"),
    ],
)
def test_values_that_the_user_gives_have_one_name_each(words, message):
    with pytest.raises(InputError, match=f"--values .*{message}"):
        parse_values(words, "--values")


def test_values_that_the_user_gives_are_read():
    words = ("background=0", "liver=6", "tumour=7,8")
    assert parse_values(words, "--values") == {"liver": (6,), "tumour": (7, 8)}
    asked = parse_values(("whole=liver,tumour", "hcc=2"), "--labels", USUAL_LABELS, overlap=True)
    assert asked == {"whole": (1, 2), "hcc": (2,)}
    assert parse_words(["liver=liver,tumour", "spleen"]) == {
        "liver": ("liver", "tumour"), "spleen": ("spleen",),
    }  # fmt: skip
    with pytest.raises(InputError, match=r"contradicts the data, which declare .*liver = 6"):
        parse_values(("liver=1",), "--labels", BTCV, overlap=True)
