"""The reported metrics agree with well-kept implementations, also where they are undefined."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import as_volume
from monai import metrics
from scipy import ndimage

from apply_model import Options, clean, demote_faint_tumours, find_doubts, report_cleaning
from data import evaluate as evaluation
from data.check import Terms, doubt_organ, judge_tumour
from data.evaluate import (
    describe_values,
    dice_metric,
    evaluate,
    list_lesions,
    match_lesions,
    measure,
    nan_mean,
    score_lesions,
    summarise,
    write_table,
)
from data.files import InputError
from data.labels import IGNORED

NAMES = ["liver", "tumour"]
BLANK = pytest.mark.usefixtures("blank_pictures")
SPACING = (0.8, 1.5, 2.5)
AFFINE = np.diag([*SPACING, 1.0])


def ball(shape, centre, radius) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) <= radius**2


def blobs(seed: int, shape=(34, 30, 22)) -> np.ndarray:
    """Random smooth pieces of both classes, some of them at the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return np.digitize(noise, np.quantile(noise, [0.7, 0.93])).astype(np.uint8)


def one_hot(classes: np.ndarray) -> torch.Tensor:
    """(1, 2, X, Y, Z): the two foreground classes, as MONAI takes them."""
    return torch.from_numpy(np.stack([classes == 1, classes == 2])[None]).float()


def score(predicted: np.ndarray, truth: np.ndarray, names=NAMES, affine=AFFINE) -> dict:
    return evaluate(as_volume(predicted, affine), as_volume(truth, affine), names)


def test_metrics_agree_with_monai_and_the_confusion_matrix():
    predicted, truth = blobs(1), blobs(102)
    predicted[:4] = 0  # else all volumes would be right
    row = score(predicted, truth)
    pair, how = (one_hot(predicted), one_hot(truth)), {"include_background": True}
    how["spacing"] = SPACING
    found = {
        "hd95_mm": metrics.compute_hausdorff_distance(*pair, percentile=95, **how),
        "asd_mm": metrics.compute_average_surface_distance(*pair, symmetric=True, **how),
        "nsd_2mm": metrics.compute_surface_dice(*pair, class_thresholds=[2.0, 2.0], **how),
    }
    for figure, values in found.items():
        ours = [row[f"{name}_{figure}"] for name in NAMES]
        assert ours == pytest.approx(values[0].tolist(), rel=1e-5), figure
    stored = [array.transpose(2, 0, 1) for array in (predicted, truth)]
    assert score(*stored, affine=AFFINE[:, [2, 0, 1, 3]]) == pytest.approx(row)
    matrix = np.zeros((3, 3))
    np.add.at(matrix, (truth.ravel(), predicted.ravel()), 1)  # rows are the truth
    tp = matrix.diagonal()
    fn, fp = matrix.sum(1) - tp, matrix.sum(0) - tp
    tn = matrix.sum() - tp - fn - fp
    expected = {
        "precision": tp / (tp + fp), "recall": tp / (tp + fn), "iou": tp / (tp + fp + fn),
        "dice": 2 * tp / (2 * tp + fp + fn), "specificity": tn / (tn + fp),
        "accuracy": (tp + tn) / matrix.sum(),
        "volume_error_ml": (fp - fn) * 0.8 * 1.5 * 2.5 / 1000,
        "volume_error_percent": 100 * (fp - fn) / (tp + fn),
    }  # fmt: skip
    for figure, values in expected.items():
        ours = [row[f"{name}_{figure}"] for name in NAMES]
        assert ours == pytest.approx(values[1:].tolist()), figure
    assert row["accuracy"] == pytest.approx(tp.sum() / matrix.sum())
    assert row["mean_iou"] == pytest.approx(expected["iou"].mean())


def test_dice_of_tensors_and_arrays_is_monais_and_an_absent_organ_has_none():
    prediction, label = np.random.default_rng(0).integers(0, 4, (2, 12, 12, 12))
    ours = dice_metric(prediction, label, num_classes=4)
    tensors = [torch.from_numpy(a) for a in (prediction, label)]
    assert np.array_equal(ours, dice_metric(*tensors, num_classes=4))
    metric = metrics.DiceMetric(include_background=False, num_classes=4)
    theirs = metric(*(tensor[None, None] for tensor in tensors))
    assert ours == pytest.approx(theirs.numpy()[0], abs=1e-6)
    empty = np.zeros((4, 4, 4), int)
    assert np.isnan(dice_metric(empty, empty)).all()
    assert dice_metric(empty + 1, empty) == dice_metric(empty, empty + 1) == [0.0]
    assert nan_mean([np.nan, 0.0, 1.0]) == 0.5


def test_undefined_metrics_are_none_and_a_false_alarm_scores_nothing():
    organ = ball((20, 20, 20), (10, 10, 10), 5).astype(np.uint8)
    nothing = np.zeros_like(organ)
    pairs = {"prediction": (nothing, organ), "truth": (organ, nothing), "both": (nothing, nothing)}
    rows = {empty: {"case": empty, **score(*pairs[empty], ["liver"])} for empty in pairs}
    keys = ("dice", "nsd_2mm", "recall", "precision", "hd95_mm", "volume_error_percent", "empty")
    missed, alarm, neither = ([row[f"liver_{key}"] for key in keys] for row in rows.values())
    assert missed == [0, 0, 0, None, None, -100, "prediction"]
    assert alarm == [0, 0, None, 0, None, None, "truth"]
    assert neither == [None, None, None, None, None, None, "both"]
    assert [rows["both"][key] for key in ("accuracy", "mean_iou", "liver_specificity")] == [1, 1, 1]
    assert score(nothing + 1, nothing + 1)["liver_specificity"] is None, "without background"
    liver = summarise(list(rows.values()), ["liver"])["liver"]
    assert liver["empty"] == {"truth": 1, "prediction": 1, "both": 1}
    assert (liver["dice"]["n"], liver["dice"]["mean"]) == (2, 0)
    assert liver["hd95_mm"] == {"n": 0}


def test_distances_on_a_sheared_grid_are_those_of_the_patient():
    """One voxel along x and two along z are (1 + 1.5, 0, 2) mm apart."""
    affine = np.eye(4)
    affine[:3, 2] = (0.75, 0, 1)
    one, other = np.zeros((2, 9, 9, 9), np.uint8)
    one[4, 4, 3] = other[5, 4, 5] = 1
    row = score(one, other, ["liver"], affine)
    assert row["liver_hd95_mm"] == pytest.approx(np.sqrt(10.25))
    assert as_volume(one, affine).voxel_ml == pytest.approx(0.001), "1.25 mm along z, 1 mm upwards"


def test_lesions_are_counted_one_by_one():
    """Four true lesions: one found, one touched by less than a tenth, two missed; one false."""
    truth, found = np.zeros((2, 80, 40, 40), bool)
    for at in (10, 40, 65):
        truth |= ball(truth.shape, (at, 20, 20), 7)
    truth |= ball(truth.shape, (25, 5, 5), 2)
    found |= ball(truth.shape, (11, 20, 20), 6)
    found[34:36, 20, 20] = True  # a corner of the second: too little of it to be right
    found |= ball(truth.shape, (25, 35, 35), 3)
    row = score_lesions(found, truth, as_volume(truth))
    assert (row["lesions"], row["lesions_found"], row["lesion_recall"]) == (4, 1, 0.25)
    assert (row["lesions_predicted"], row["lesions_right"]) == (3, 1)
    assert (row["lesions_found_0_to_10_mm"], row["lesions_found_10_to_20_mm"]) == (0, 1)
    empty = score_lesions(0 * truth > 0, 0 * truth > 0, as_volume(truth))
    assert empty["lesion_recall"] is empty["lesion_precision"] is None


def test_each_lesion_has_its_volume_and_its_longest_axial_diameter():
    """On voxels of 0.5 × 1 × 3 mm: a bar of 2 × 20 × 2 voxels, and a single voxel."""
    classes = np.zeros((30, 40, 10), np.uint8)
    classes[5:7, 5:25, 3:5] = classes[20, 30, 8] = 2
    bar, dot = list_lesions(as_volume(classes, np.diag([0.5, 1, 3, 1])), NAMES)
    assert bar == {"class": "tumour", "ml": 0.12, "longest_axial_mm": pytest.approx(20, abs=0.1),
                   "first_slice": 4, "last_slice": 5}  # fmt: skip
    assert (dot["ml"], dot["longest_axial_mm"], dot["first_slice"]) == (0.0, 1.0, 9)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_voxels_in_one_line_are_counted_and_cleaned(axis):
    """Parts of 1, 1 and 2 voxels in a line, on which cc3d fails if they are bool. Of one slice both
    ends cut all."""
    classes = np.moveaxis(np.zeros((1, 1, 6), np.uint8), 2, axis)
    line = classes.ravel()
    line[[0, 2, 4, 5]] = 2
    assert len(list_lesions(as_volume(classes), NAMES)) == 3
    assert match_lesions(classes == 2, classes == 2)[0].tolist() == [1, 1, 2]
    line[[2, 4]] = 1
    terms = Terms({"background": (0,), "liver": (1,), "tumour": (2,)}, (1, 2))
    assert judge_tumour(classes, terms)[0][1].startswith("1 tumour voxels")
    assert doubt_organ("spleen", classes == 1, classes == 2, classes, (1, 1, 1)) == []
    assert clean(classes, NAMES).ravel().tolist() == [0, 0, int(axis < 2), 0, 1, 2]


def test_a_lesion_is_matched_with_all_that_touches_it():
    """Two findings in one lesion of 40 voxels: 10 voxels inside, and 12 of which 4 are outside."""
    truth, found = np.zeros((2, 20, 10, 10), bool)
    truth[2:12, 2:4, 2:4] = truth[15:17, 2:4, 2:4] = True
    found[2:7, 2:4, 2] = found[8:13, 2:4, 3] = found[13:14, 2:4, 3] = True
    sizes, hit, dice = match_lesions(truth, found)
    assert sizes.tolist() == [40, 8] and hit.tolist() == [True, False]
    assert dice.tolist() == pytest.approx([2 * 18 / (40 + 22), 0])
    part = np.zeros_like(truth)
    for last, counts in ((5, (0, 0)), (6, (1, 0))):  # IoU of 3 / 40, of 4 / 40 with a low Dice
        part[2:last, 2, 2] = True
        row = score_lesions(part, truth, as_volume(truth))
        assert (row["lesions_found"], row["lesions_found_dice_50"]) == counts
    lines = np.zeros((3, 600, 9), bool)
    lines[0, :523, 0] = lines[2, :524, 4] = True  # balls of equal volume: 9.99 and 10.002 mm
    row = score_lesions(lines, lines, as_volume(lines))
    assert (row["lesions_0_to_10_mm"], row["lesions_10_to_20_mm"]) == (1, 1)


def test_post_processing_keeps_the_organ_and_its_tumours():
    shape = (60, 40, 40)
    classes = ball(shape, (20, 20, 20), 12).astype(np.uint8)
    classes[ball(shape, (16, 20, 20), 3) | ball(shape, (27, 20, 20), 2)] = 2  # in one liver
    expected, stray = classes.copy(), ball(shape, (52, 20, 20), 4)
    classes[20, 12, 20] = 0  # a hole
    classes[stray] = 1
    classes[52, 20, 20] = 2  # a tumour in the stray component
    classes[45, 2, 2] = 2  # a tumour in nothing
    assert np.array_equal(clean(classes, NAMES), expected)
    off = {"largest_component": False, "fill_holes": False, "tumour_inside": False}
    assert np.array_equal(clean(classes, NAMES, Options(**off)), classes), "the input stays"
    assert (clean(classes, NAMES, Options(**off | {"fill_holes": True})) != classes).sum() == 1
    only_inside = clean(classes, NAMES, Options(**off | {"tumour_inside": True}))
    assert (only_inside[45, 2, 2], only_inside[52, 20, 20]) == (0, 2)
    only_largest = clean(classes, NAMES, Options(**off | {"largest_component": True}))
    assert only_largest[45, 2, 2] == 2 and not (only_largest[stray] == 1).any()
    assert not clean(np.zeros(shape, np.uint8), NAMES).any()
    small = np.zeros((12, 12, 12), np.uint8)
    small[:2, :2, :2] = small[2, 2, 2] = 1  # hangs by a corner
    expected = small.copy()
    small[5:9, 5:9, 5:9] = 2  # larger, but no liver
    assert np.array_equal(clean(small, NAMES), expected)


@pytest.mark.parametrize("other", [0, -1])
def test_lobes_that_the_same_end_of_the_scan_cuts_both_stay(other):
    """Two of them may be one beyond it. Where the end cuts only the smaller one, it goes."""
    classes = np.zeros((20, 9, 6), np.uint8)
    classes[2:9, 2:7], classes[12:16, 2:7], classes[17:19, 2:4, 2:4] = 1, 1, 1
    expected = classes.copy()
    expected[17:19] = 0  # reaches no end
    classes[18, 7:9] = 1  # 12 of 210 voxels: less than a tenth
    assert np.array_equal(clean(classes, NAMES), expected)
    classes[2:9, :, 0] = classes[2:9, :, -1] = 0
    classes[12:16, :, other] = 0
    assert not clean(classes, NAMES)[12:].any()


def test_a_tumour_that_is_nowhere_sure_becomes_organ():
    """Above SURE of 0.8 is e^2.5 / (1 + 1 + e^2.5) = 0.86; e^2 / (1 + 1 + e^2) = 0.79 is not."""
    scores = torch.full((3, 9, 6, 6), -9.0)
    scores[0, 1:8, 1:5, 1:5], scores[1, 2:4, 2:4, 2:4], scores[1, 5:7, 2:4, 2:4] = 0.0, 1.0, 1.0
    scores[1, 3, 3, 3], scores[1, 6, 3, 3] = 2.0, 2.5
    expected = scores.clone()
    expected[:2, 2:4, 2:4, 2:4] = scores[[1, 0], 2:4, 2:4, 2:4]
    names = ["liver", "tumour", "spleen"]
    assert demote_faint_tumours(scores, names) == []  # 8 of 16 voxels: no more than half
    assert torch.equal(scores, expected)
    scores[1, 6, 3, 3] = 2.0
    (note,) = demote_faint_tumours(scores, names)
    assert "--no-sure-tumours" in note and (scores[1] <= scores[0]).all()


def test_much_that_cleaning_changes_is_reported_with_the_option_that_prevents_it():
    """A liver of 1000 voxels of 1 ml: told are more than 20 ml, or more than 5 % of a small one."""
    before = np.zeros((40, 20, 20), np.uint8)
    before[5:15, 5:15, 5:15] = 1
    for what, part, value, option in (
        ("30 ml of liver beside", np.s_[25:31, 5:10, 5], 1, "largest-component"),
        ("21 ml of tumour outside", np.s_[25:28, 5:12, 5], 2, "tumour-inside"),
        ("24 ml of holes in liver", np.s_[8:12, 8:11, 8:10], 0, "fill-holes"),
    ):
        found = before.copy()
        found[part] = value
        told = report_cleaning(found, clean(found, NAMES), NAMES, 1.0)
        assert len(told) == 1 and told[0].startswith(what), told
        assert told[0].endswith(f"--no-{option} prevents it")
        assert not report_cleaning(found, clean(found, NAMES), NAMES, 0.6)
    before[25:31, 5:15, 5] = 1
    assert report_cleaning(before, clean(before, NAMES), NAMES, 0.3), "18 ml of 300 ml"


def test_implausible_livers_are_reported():
    shape, affine = (80, 60, 40), np.diag([4.0, 4.0, 5.0, 1.0])
    scan = np.where(ball(shape, (40, 30, 20), 28), 40, -1000).astype(np.int16)
    right = ball(shape, (52, 30, 20), 16).astype(np.uint8)

    def doubt(classes, organ="liver", fine=1):
        maps = (classes, scan[..., : classes.shape[2]])
        maps = (array.repeat(fine, axis=0).repeat(fine, axis=1) for array in maps)
        finer = affine / [fine, fine, 1, 1]
        return find_doubts(*(as_volume(array, finer) for array in maps), [organ])

    assert doubt(right) == doubt(right, fine=3) == doubt(right[::-1], organ="spleen") == []
    assert "left" in doubt(right[::-1])[0]
    assert ["upper end" in text for text in doubt(right[:, :, :20])] == [True]
    assert doubt(0 * right) == ["no liver found"]


def test_measurements_in_units():
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[5:15, 5:10, 5:9] = 1
    scan = np.where(mask, 60, -100).astype(np.int16)
    scan[5:10][mask[5:10] > 0] = 80
    row = measure(as_volume(mask, AFFINE), as_volume(scan, AFFINE), ["liver", "spleen"])
    assert row["liver_volume_ml"] == 0.6, "200 voxels of 3 mm³"
    assert (row["liver_hu_mean"], row["liver_hu_sd"]) == (70, 10)
    assert [row[f"liver_extent_{axis}_mm"] for axis in "xyz"] == [8.0, 7.5, 10.0]
    assert (row["spleen_volume_ml"], row["spleen_hu_mean"]) == (0, None)


def test_the_summary_names_the_worst():
    low = describe_values({"a": 0.9, "b": 0.5, "c": 0.7}, "low")
    assert (low["worst"], low["worst_case"], low["median"], low["n"]) == (0.5, "b", 0.7, 3)
    assert low["sd"] == pytest.approx(0.2)
    assert describe_values({"a": -30.0, "b": 10.0}, "far")["worst_case"] == "a"


@BLANK
def test_a_summary_is_of_one_network_whatever_an_earlier_version_lacks(tmp_path):
    row = {"truth": "t", "weights": "b", **score(blobs(1), blobs(2))}
    old = {key: value for key, value in row.items() if "nsd" not in key}
    rows = [old | {"case": "a"}, row | {"case": "b"}, row | {"case": "c", "weights": "a"}]
    evaluation.report(rows, NAMES, tmp_path, "b")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["patients"], summary["liver"]["nsd_2mm"]["n"]) == (2, 1)


def write_maps(folder, maps, values=(0, 1, 2), dtype=np.uint8, suffix=".nii.gz"):
    for name, classes in maps.items():
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        as_volume(np.array(values, dtype)[classes], AFFINE).write(path)
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write_maps(tmp_path / kind, {f"liver_{n}": blobs(n + shift) for n in range(3)})
        for kind, shift in (("predictions", 0), ("truths", 10))
    ]


def run_evaluation(predictions, truths, **settings):
    out = predictions.parent / "out"
    evaluation.main(evaluation.Config(predictions, truths, out, **settings))
    return {row["case"]: row for row in json.loads((out / "results.json").read_text())}


def test_folders_are_evaluated_by_name(folders, capsys):
    rows = run_evaluation(*folders)
    assert sorted(rows) == ["liver_0", "liver_1", "liver_2"]
    for n in range(3):
        expected = score(blobs(n), blobs(n + 10))
        assert {key: rows[f"liver_{n}"][key] for key in expected} == pytest.approx(expected)
    out = folders[0].parent / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["patients"] == 3
    assert (out / "summary.png").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert summary["liver"]["dice"]["worst_case"] in told
    assert f"look at {out / 'summary.png'}" in told


@BLANK
def test_results_of_apply_model_are_evaluated_by_case(folders, tmp_path, capsys):
    results = tmp_path / "results"
    for kind in ("label", "masked"):  # the masked volume is no label map
        write_maps(results, {f"liver_{n}/liver_{n}_{kind}": blobs(n) for n in range(3)})
    (folders[1] / "liver_2.nii.gz").unlink()
    rows = run_evaluation(results, folders[1])
    assert sorted(rows) == ["liver_0", "liver_1"]
    assert rows["liver_0"]["liver_dice"] == run_evaluation(*folders)["liver_0"]["liver_dice"]
    assert "no label map for liver_2_label.nii.gz" in capsys.readouterr().out


SPOILT = {  # what is told → how a label map is spoilt
    "cut off|damaged": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "200|100": lambda path: as_volume(blobs(1) * 100, AFFINE).write(path),
    "label map is": lambda path: as_volume(blobs(1)[:-1], AFFINE).write(path),
    "voxels apart": lambda path: as_volume(blobs(1), AFFINE + 2 * np.eye(4, k=3)).write(path),
}


@pytest.mark.parametrize("told", SPOILT)
@BLANK
def test_a_case_that_fails_is_named_and_the_others_go_on(folders, told):
    SPOILT[told](folders[told in ("label map is", "200|100")] / "liver_1.nii.gz")
    with pytest.raises(InputError, match=rf"1 of 3 cases failed:\n.*liver_1\.nii\.gz.*({told})"):
        run_evaluation(*folders)
    rows = json.loads((folders[0].parent / "out" / "results.json").read_text())
    assert [row["case"] for row in rows] == ["liver_0", "liver_2"]


@BLANK
def test_classes_may_overlap_and_be_numbered_otherwise(folders, tmp_path):
    whole = run_evaluation(*folders, labels={"liver": ("1", "2")})["liver_0"]
    both = run_evaluation(*folders, labels={"liver": ("1", "2"), "tumour": ("2",)})["liver_0"]
    assert list(both).index("liver_dice") < list(both).index("tumour_dice"), "as asked for"
    alone = run_evaluation(*folders)["liver_0"]
    assert both["liver_dice"] == whole["liver_dice"] != alone["liver_dice"]
    assert both["tumour_dice"] == alone["tumour_dice"]
    assert both["tumour_lesions"] == alone["tumour_lesions"]
    others = write_maps(tmp_path / "5", {f"liver_{n}": blobs(n) for n in range(3)}, (0, 5, 7))
    with pytest.raises(InputError, match="holds"):
        run_evaluation(others, folders[1])
    rows = run_evaluation(others, folders[1], predicted={"liver": ("5",), "tumour": ("7",)})
    assert rows["liver_0"]["liver_dice"] == alone["liver_dice"]
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": [1, 2]}}')
    assert run_evaluation(*folders)["liver_0"]["liver_dice"] == whole["liver_dice"]


@BLANK
def test_values_beside_the_classes_must_be_declared(folders, tmp_path):
    truths = write_maps(tmp_path / "more", {f"liver_{n}": blobs(n) for n in range(3)}, (0, 1, 9))
    with pytest.raises(InputError, match=r"holds \[9\]"):
        run_evaluation(folders[0], truths, labels={"liver": ("1",)}, others=(2,))
    rows = run_evaluation(folders[0], truths, labels={"liver": ("1",)}, others=(2, 9))
    assert rows["liver_0"]["liver_dice"] == 1
    for name, word in (("liver", "0"), ("liver", "spleen"), ("", "1")):
        with pytest.raises(InputError, match="--labels"):
            run_evaluation(*folders, labels={name: (word,)})


def test_ignored_voxels_count_nowhere():
    predicted, truth = blobs(1), blobs(2)
    unknown = ball(truth.shape, (10, 10, 10), 6)
    right = np.count_nonzero((predicted == truth) & ~unknown) / np.count_nonzero(~unknown)
    truth[unknown] = IGNORED
    row = score(predicted, truth)
    assert row["accuracy"] == pytest.approx(right)
    predicted[unknown] = truth[unknown] = 0
    assert row["liver_dice"] == score(predicted, truth)["liver_dice"]


def test_a_spreadsheet_runs_nothing(tmp_path):
    names = ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1"]
    write_table([{"case": n, "value": -1.5, "none": None} for n in names], tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").open(newline="")))
    assert rows == [{"case": f"'{name}", "value": "-1.5", "none": ""} for name in names]
