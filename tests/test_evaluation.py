"""The figures that are reported agree with well-kept implementations, also where they are odd."""

import csv
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import random_affine, run_here, run_script
from helpers import as_volume
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy import ndimage

from apply_model import Options, clean, find_doubts, trim_by_hu
from data import evaluate as evaluation
from data.check import judge_hu
from data.datasets import pair_truths
from data.evaluate import (
    describe_values,
    evaluate,
    measure,
    print_summary,
    score_lesions,
    summarise,
    write_table,
)
from data.files import InputError
from data.labels import IGNORED
from data.volumes import find_bounding_box

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


@pytest.mark.parametrize("seed", range(4))
def test_surface_figures_agree_with_monai(seed):
    predicted, truth = blobs(seed), blobs(seed + 100 * (seed % 2) + 1)
    row = evaluate(as_volume(predicted, AFFINE), as_volume(truth, AFFINE), NAMES)
    pair, options = (one_hot(predicted), one_hot(truth)), {"include_background": True}
    hd95 = compute_hausdorff_distance(*pair, percentile=95, spacing=SPACING, **options)
    asd = compute_average_surface_distance(*pair, symmetric=True, spacing=SPACING, **options)
    nsd = compute_surface_dice(*pair, class_thresholds=[2.0, 2.0], spacing=SPACING, **options)
    for index, name in enumerate(NAMES):
        assert row[f"{name}_hd95_mm"] == pytest.approx(float(hd95[0, index]), rel=1e-4)
        assert row[f"{name}_asd_mm"] == pytest.approx(float(asd[0, index]), rel=1e-4)
        assert row[f"{name}_nsd_2mm"] == pytest.approx(float(nsd[0, index]), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_overlap_figures_agree_with_the_confusion_matrix(seed):
    """scikit-learn's formulas, from its confusion matrix: rows are the truth."""
    predicted, truth = blobs(seed), blobs(seed + 1)
    row = evaluate(as_volume(predicted, AFFINE), as_volume(truth, AFFINE), NAMES)
    matrix = np.zeros((3, 3))
    np.add.at(matrix, (truth.ravel(), predicted.ravel()), 1)
    tp, fn, fp = matrix.diagonal(), matrix.sum(1) - matrix.diagonal(), 0
    fp = matrix.sum(0) - tp
    tn = matrix.sum() - tp - fn - fp
    expected = {
        "precision": tp / (tp + fp), "recall": tp / (tp + fn), "iou": tp / (tp + fp + fn),
        "dice": 2 * tp / (2 * tp + fp + fn), "specificity": tn / (tn + fp),
        "accuracy": (tp + tn) / matrix.sum(),
        "volume_error_ml": (fp - fn) * 0.8 * 1.5 * 2.5 / 1000,
        "volume_error_percent": 100 * (fp - fn) / (tp + fn),
    }  # fmt: skip
    for figure, values in expected.items():
        for index, name in enumerate(NAMES, start=1):
            assert row[f"{name}_{figure}"] == pytest.approx(values[index]), figure
    assert row["accuracy"] == pytest.approx(tp.sum() / matrix.sum())
    assert row["mean_iou"] == pytest.approx(expected["iou"].mean())


def test_empty_cases_are_told():
    organ = ball((20, 20, 20), (10, 10, 10), 5).astype(np.uint8)
    nothing = np.zeros_like(organ)
    missed = evaluate(as_volume(nothing, AFFINE), as_volume(organ, AFFINE), ["liver"])
    assert (missed["liver_dice"], missed["liver_nsd_2mm"], missed["liver_recall"]) == (0, 0, 0)
    assert missed["liver_empty"] == "prediction"
    assert missed["liver_hd95_mm"] is missed["liver_precision"] is None
    assert missed["liver_volume_error_percent"] == -100
    alarm = evaluate(as_volume(organ, AFFINE), as_volume(nothing, AFFINE), ["liver"])
    assert (alarm["liver_dice"], alarm["liver_nsd_2mm"]) == (0, 0)
    assert alarm["liver_volume_error_percent"] is alarm["liver_recall"] is None
    assert alarm["liver_empty"] == "truth"
    neither = evaluate(as_volume(nothing, AFFINE), as_volume(nothing, AFFINE), ["liver"])
    assert neither["liver_empty"] == "both"
    assert neither["liver_dice"] is neither["liver_nsd_2mm"] is neither["liver_hd95_mm"] is None
    assert (neither["accuracy"], neither["mean_iou"], neither["liver_specificity"]) == (1, 1, 1)
    without_tumour = evaluate(as_volume(nothing, AFFINE), as_volume(nothing, AFFINE), NAMES)
    assert (without_tumour["tumour_lesions"], without_tumour["tumour_lesion_recall"]) == (0, None)
    rows = [{"case": c, **r} for c, r in (("a", missed), ("b", alarm), ("c", neither))]
    summary = summarise(rows, ["liver"])
    assert summary["liver"]["empty"] == {"truth": 1, "prediction": 1, "both": 1}
    assert (summary["liver"]["dice"]["n"], summary["liver"]["dice"]["mean"]) == (2, 0)
    assert summary["liver"]["hd95_mm"] == {"n": 0}
    assert "NaN" not in json.dumps(summary)


def test_one_voxel_and_a_full_volume():
    single = np.zeros((5, 5, 5), np.uint8)
    other = single.copy()
    single[0, 2, 2] = other[3, 2, 2] = 1
    row = evaluate(as_volume(single, AFFINE), as_volume(other, AFFINE), ["liver"])
    assert row["liver_hd95_mm"] == row["liver_asd_mm"] == pytest.approx(3 * 0.8)
    assert row["liver_nsd_2mm"] == 0
    full = np.ones((5, 5, 5), np.uint8)
    row = evaluate(as_volume(full, AFFINE), as_volume(full, AFFINE), ["liver"])
    assert (row["liver_dice"], row["liver_hd95_mm"], row["liver_nsd_2mm"]) == (1, 0, 1)
    assert row["liver_specificity"] is None  # there is no background to get wrong


def test_two_millimetres_are_within_two_millimetres():
    near = ball((30, 20, 20), (10, 10, 10), 6).astype(np.uint8)
    affine = random_affine(3, (1.0, 1.0, 1.0))
    row = evaluate(*(as_volume(a, affine) for a in (np.roll(near, 2, axis=0), near)), ["liver"])
    assert row["liver_nsd_2mm"] == 1
    assert row["liver_hd95_mm"] <= 2 + 1e-9


def test_distances_do_not_depend_on_how_a_patient_is_stored():
    predicted, truth = (blobs(7) > 0).astype(np.uint8), (blobs(8) > 0).astype(np.uint8)
    first = evaluate(as_volume(predicted, AFFINE), as_volume(truth, AFFINE), ["liver"])
    turned = random_affine(1, spacing=SPACING)  # columns come in another order
    order = np.argsort(np.linalg.norm(turned[:3, :3], axis=0))
    assert np.allclose(sorted(SPACING), np.linalg.norm(turned[:3, :3], axis=0)[order])
    lengths = np.linalg.norm(turned[:3, :3], axis=0)
    back = [SPACING.index(pytest.approx(length)) for length in lengths]
    second = evaluate(
        *(as_volume(a.transpose(back), turned) for a in (predicted, truth)), ["liver"]
    )
    for key, value in first.items():
        assert second[key] == pytest.approx(value), key


def test_lesions_are_counted_one_by_one():
    """Three true lesions; one found, one touched by less than a tenth, one missed; one false."""
    truth, found = np.zeros((2, 80, 40, 40), bool)
    for at in (10, 40, 65):
        truth |= ball(truth.shape, (at, 20, 20), 7)
    truth |= ball(truth.shape, (25, 5, 5), 2)
    found |= ball(truth.shape, (11, 20, 20), 6)
    found[34:36, 20, 20] = True  # a corner of the second
    found |= ball(truth.shape, (25, 35, 35), 3)
    row = score_lesions(found, truth, as_volume(truth))
    assert (row["lesions"], row["lesions_found"]) == (4, 1)
    assert row["lesion_recall"] == 0.25
    # The two voxels in the second lesion are themselves right: they lie in a tumour.
    assert (row["lesions_predicted"], row["lesions_right"]) == (3, 2)
    assert (row["lesions_0_to_10_mm"], row["lesions_10_to_20_mm"]) == (1, 3)
    assert (row["lesions_found_0_to_10_mm"], row["lesions_found_10_to_20_mm"]) == (0, 1)
    empty = score_lesions(np.zeros_like(truth), np.zeros_like(truth), as_volume(truth))
    assert empty["lesion_recall"] is empty["lesion_precision"] is None


def test_post_processing_keeps_the_organ_and_its_tumours():
    shape = (60, 40, 40)
    classes = ball(shape, (20, 20, 20), 12).astype(np.uint8)
    tumours = ball(shape, (16, 20, 20), 3) | ball(shape, (27, 20, 20), 2)
    classes[tumours] = 2  # two tumours in one liver
    classes[20, 12, 20] = 0  # a hole
    whole = classes.copy()
    whole[20, 12, 20] = 1
    stray = ball(shape, (52, 20, 20), 4)
    classes[stray] = 1
    classes[52, 20, 20] = 2  # a tumour in the stray piece
    classes[45, 2, 2] = 2  # a tumour in nothing
    before = classes.copy()
    assert np.array_equal(clean(classes, NAMES), whole)
    assert np.array_equal(classes, before), "the input stays as it is"
    off = {"largest_component": False, "fill_holes": False, "tumour_inside": False}
    assert np.array_equal(clean(classes, NAMES, Options(**off)), classes)
    only_holes = clean(classes, NAMES, Options(**off | {"fill_holes": True}))
    assert (only_holes != classes).sum() == 1
    only_inside = clean(classes, NAMES, Options(**off | {"tumour_inside": True}))
    assert only_inside[45, 2, 2] == 0
    assert only_inside[52, 20, 20] == 2
    only_largest = clean(classes, NAMES, Options(**off | {"largest_component": True}))
    assert not (only_largest[stray] == 1).any()
    assert only_largest[45, 2, 2] == 2
    assert not clean(np.zeros(shape, np.uint8), NAMES).any()


@pytest.mark.parametrize("seed", range(3))
def test_post_processing_agrees_with_scipy(seed):
    classes = (blobs(seed) > 0).astype(np.uint8)
    labels, count = ndimage.label(classes, np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(classes, labels, range(1, count + 1))
    largest = ndimage.binary_fill_holes(labels == 1 + int(np.argmax(sizes)))
    assert np.array_equal(clean(classes, ["liver"]) > 0, largest)


def draw_neighbour(names=("liver",), noise=5.0, hu=5):
    """Scores and HU of a liver of 100 HU; what touches it is liver too, if less surely. Two of its
    tumours are as dark as bile: a sure one, and one at the edge of a slice but one."""
    shape, rng = (60, 40, 40), np.random.default_rng(0)
    liver, neighbour = ball(shape, (20, 20, 20), 14), ball(shape, (33, 20, 20), 5)
    tumours = ball(shape, (16, 20, 20), 4) | ball(shape, (20, 20, 31), 2)
    image = np.where(liver & ~tumours & ~neighbour, 100, np.where(tumours, 5, hu))
    depth = ndimage.distance_transform_edt(liver | neighbour)
    scores = np.where(liver | neighbour, np.minimum(depth, 8) - 0.5, -6)
    scores[neighbour] = scores[neighbour].clip(max=1)
    every = np.repeat(scores[None], len(names), 0).astype(np.float32)
    return every, image + rng.normal(0, noise, shape), tumours, neighbour


def test_a_dark_edge_is_no_liver_and_dark_tumours_stay():
    scores, image, tumours, neighbour = draw_neighbour(hu=-15)
    before = scores.copy()
    trim_by_hu(scores, image, ["liver"])
    assert ((scores != before)[0] <= neighbour).all()
    assert (scores[0][neighbour] < 0).all()
    assert (scores[0][tumours] > 0).all()
    scaled = before.copy()
    trim_by_hu(scaled, (image + 200) / 450, ["liver"], 450)
    assert np.array_equal(scaled, scores)


@pytest.mark.parametrize(
    "case",
    [
        {"names": ["kidney"]},  # whose marrow is dark beside its cortex
        {"names": ["tumour"]},
        {"hu": 50},  # a fatty rim, a poorly filled one
        {"hu": 220},  # a tumour that is full of contrast
        {"noise": 60.0},  # of which a voxel is no edge
    ],
)
def test_nothing_else_is_trimmed(case):
    names = case.get("names", ["liver"])
    scores, image, *_ = draw_neighbour(**case)
    before = scores.copy()
    trim_by_hu(scores, image, names)
    lost = (before > 0) & (scores < 0)
    assert lost.sum() < 0.01 * (before > 0).sum()
    nothing = np.full_like(before, -6)
    trim_by_hu(nothing, image, names)
    assert (nothing == -6).all()


def test_what_is_implausible_is_told():
    """A liver of 1.4 l on the right is fine; on the left, small, or cut off it is not."""
    shape, affine = (80, 60, 40), np.diag([4.0, 4.0, 5.0, 1.0])
    scan = np.where(ball(shape, (40, 30, 20), 28), 40, -1000).astype(np.int16)
    right = ball(shape, (52, 30, 20), 16).astype(np.uint8)

    def doubt(classes, scan, names):
        return find_doubts(as_volume(classes, affine), as_volume(scan, affine), names)

    assert doubt(right, scan, ["liver"]) == []
    assert "left" in doubt(right[::-1], scan, ["liver"])[0]
    small = doubt(ball(shape, (52, 30, 20), 5).astype(np.uint8), scan, ["liver"])
    assert "expected 500 to 4000" in small[0]
    cut = doubt(right[:, :, :20], scan[:, :, :20], ["liver"])
    assert ["upper end" in text for text in cut] == [True]
    assert doubt(np.zeros_like(right), scan, ["liver"]) == ["no liver found"]
    assert doubt(right[::-1], scan, ["spleen"]) == []


def test_what_is_no_ct_is_told():
    rng = np.random.default_rng(0)
    ct = rng.choice([-1000, -100, 50], (32, 32, 32)).astype(np.int16)
    assert judge_hu(ct, ct.dtype) == []
    for array, kind, told in (
        (ct.astype(np.uint8), "hu", "8 bits"),
        (ct // 10, "hu", "too narrow"),
        (ct * 0 + 7, "hu", "every voxel is 7"),
        (ct + 1024, "hu", "no fat or air"),
        (np.where(ct < -500, 400, ct), "air", "no air near"),
        (np.full((8, 8, 8), np.nan), "hu", "finite"),
    ):
        ((found, text),) = judge_hu(array, array.dtype)
        assert found == kind and told in text
    some = np.where(ct == 50, np.nan, ct.astype(np.float32))  # the rest is judged
    assert judge_hu(some, some.dtype) == []


def test_measurements_in_units():
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[5:15, 5:10, 5:9] = 1
    scan = np.where(mask, 60, -100).astype(np.int16)
    scan[5:10][mask[5:10] > 0] = 80
    row = measure(as_volume(mask, AFFINE), as_volume(scan, AFFINE), ["liver", "spleen"])
    assert row["liver_volume_ml"] == pytest.approx(200 * 3 / 1000)
    assert (row["liver_hu_mean"], row["liver_hu_sd"]) == (70, 10)
    extent = [row[f"liver_extent_{axis}_mm"] for axis in "xyz"]
    assert extent == [8.0, 7.5, 10.0]
    assert (row["spleen_volume_ml"], row["spleen_hu_mean"]) == (0, None)
    assert [part.stop - part.start for part in find_bounding_box(mask)] == [10, 5, 4]


def test_summary_names_the_worst():
    values = {"a": 0.9, "b": 0.5, "c": 0.7}
    low = describe_values(values, "low")
    assert (low["worst"], low["worst_case"], low["median"], low["n"]) == (0.5, "b", 0.7, 3)
    assert low["sd"] == pytest.approx(np.std([0.9, 0.5, 0.7], ddof=1))
    assert describe_values({"a": -30.0, "b": 10.0}, "far")["worst_case"] == "a"
    assert describe_values({"a": 3.0, "b": math.pi}, "high")["worst_case"] == "b"


# ---------------------------------------------------------------------------------------
# Run as a script: label maps of any program
# ---------------------------------------------------------------------------------------


def write_maps(folder, maps, values=(0, 1, 2), dtype=np.uint8, suffix=".nii.gz"):
    for name, classes in maps.items():
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        as_volume(np.array(values, dtype)[classes], AFFINE).write(path)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Predictions and truths of three patients, liver = 1 and tumour = 2."""
    return [
        write_maps(tmp_path / kind, {f"liver_{n}": blobs(n + shift) for n in range(3)})
        for kind, shift in (("predictions", 0), ("truths", 10))
    ]


def run_evaluation(predictions, truths, **settings):
    out = settings.setdefault("destination", predictions.parent / "out")
    evaluation.main(evaluation.Config(predictions, truths, **settings))
    rows = json.loads((out / "results.json").read_text())
    return {row["case"]: row for row in rows}


def test_folders_are_evaluated_by_name(folders, capsys):
    rows = run_evaluation(*folders)
    assert sorted(rows) == ["liver_0", "liver_1", "liver_2"]
    for n in range(3):
        pair = (as_volume(blobs(n + shift), AFFINE) for shift in (0, 10))
        expected = evaluate(*pair, NAMES)
        assert {key: rows[f"liver_{n}"][key] for key in expected} == pytest.approx(expected)
    out = folders[0].parent / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["patients"] == 3
    assert (out / "summary.png").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert f"the worst: {summary['liver']['dice']['worst_case']} (Dice" in told
    assert f"look at {out / 'summary.png'}" in told


@BLANK
def test_results_of_apply_model_are_evaluated_by_case(folders, tmp_path, capsys):
    for path in folders[0].iterdir():
        case = path.name.removesuffix(".nii.gz")
        for kind in ("label", "masked"):  # the masked volume is no label map
            target = tmp_path / "results" / case / f"{case}_{kind}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (folders[1] / "liver_2.nii.gz").unlink()
    rows = run_evaluation(tmp_path / "results", folders[1])
    assert sorted(rows) == ["liver_0", "liver_1"]
    expected = evaluate(*(as_volume(blobs(shift), AFFINE) for shift in (0, 10)), NAMES)
    assert rows["liver_0"]["liver_dice"] == pytest.approx(expected["liver_dice"])
    assert "no truth of this name" in capsys.readouterr().out


def test_results_of_apply_model_are_truths_too(tmp_path):
    """As they are after a correction, or to compare two networks."""
    scans = [tmp_path / f"{name}.nii.gz" for name in "ab"]
    results = write_maps(tmp_path / "results", {f"{n}/{n}_label": blobs(0) for n in "ab"})
    write_maps(results, {f"{n}/{n}_masked": blobs(0) for n in "ab"})
    assert pair_truths(scans, [results]) == [results / n / f"{n}_label.nii.gz" for n in "ab"]


@BLANK
def test_two_files_are_a_pair_whatever_their_names(folders):
    pair = [folder / f"liver_{n}.nii.gz" for n, folder in enumerate(folders)]
    assert list(run_evaluation(*pair, destination=folders[0].parent / "out")) == ["liver_0"]


@BLANK
def test_predictions_may_be_stored_and_named_otherwise(folders, tmp_path):
    """Other axes, half a hundredth of a mm off, floats, nnU-Net's channel and suffixes."""
    expected = run_evaluation(*folders)
    turn = np.array([[1, -1], [2, 1], [0, -1]])
    for n in range(3):
        array = apply_orientation(blobs(n).astype(np.float32), turn)
        affine = AFFINE @ inv_ornt_aff(turn, blobs(n).shape) + 0.005 * np.eye(4, k=3)
        path = tmp_path / "others" / f"liver_{n}_0000.nii"
        path.parent.mkdir(exist_ok=True)
        as_volume(array, affine).write(path)
    rows = run_evaluation(tmp_path / "others", folders[1])
    figures = [key for key in expected["liver_0"] if "liver" in key or "tumour" in key]
    for row, before in zip(rows.values(), expected.values(), strict=True):
        for key in figures:
            assert row[key] == pytest.approx(before[key]), key


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "cut off|damaged"),
        (lambda path: as_volume(blobs(1) * 100, AFFINE).write(path), "200|100"),
        (lambda path: as_volume(blobs(1)[:-1], AFFINE).write(path), "label map is"),
        (lambda path: as_volume(blobs(1), AFFINE + 2 * np.eye(4, k=3)).write(path), "voxels apart"),
        (lambda path: nib.save(nib.Nifti1Image(blobs(1) * np.nan, AFFINE), path), "NaN"),
    ],
)
@pytest.mark.parametrize("which", [0, 1], ids=["prediction", "truth"])
@BLANK
def test_a_case_that_fails_is_named_and_the_others_go_on(folders, spoil, told, which):
    spoil(folders[which] / "liver_1.nii.gz")
    with pytest.raises(InputError, match=rf"1 of 3 cases failed:\n.*liver_1\.nii\.gz.*({told})"):
        run_evaluation(*folders)
    rows = json.loads((folders[0].parent / "out" / "results.json").read_text())
    assert [row["case"] for row in rows] == ["liver_0", "liver_2"]


@BLANK
def test_classes_may_overlap_and_be_numbered_otherwise(folders, tmp_path):
    """A liver with its tumours, and the tumours: as LiTS counts; predictions of another program."""
    whole = run_evaluation(*folders, labels=("liver=1,2",))["liver_0"]
    both = run_evaluation(*folders, labels=("liver=1,2", "tumour=2"))["liver_0"]
    alone = run_evaluation(*folders)["liver_0"]
    assert both["liver_dice"] == whole["liver_dice"] != alone["liver_dice"]
    assert both["tumour_dice"] == alone["tumour_dice"]
    assert both["tumour_lesions"] == alone["tumour_lesions"]
    others = write_maps(tmp_path / "5", {f"liver_{n}": blobs(n) for n in range(3)}, (0, 5, 7))
    with pytest.raises(InputError, match="holds"):
        run_evaluation(others, folders[1])
    rows = run_evaluation(others, folders[1], predicted=("liver=5", "tumour=7"))
    assert rows["liver_0"]["liver_dice"] == alone["liver_dice"]
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": [1, 2]}}')
    assert run_evaluation(*folders)["liver_0"]["liver_dice"] == whole["liver_dice"]


@BLANK
def test_values_beside_the_classes_must_be_declared(folders, tmp_path):
    truths = write_maps(tmp_path / "more", {f"liver_{n}": blobs(n) for n in range(3)}, (0, 1, 9))
    with pytest.raises(InputError, match=r"holds \[9\]"):
        run_evaluation(folders[0], truths, labels=("liver=1",), others=(2,))
    rows = run_evaluation(folders[0], truths, labels=("liver=1",), others=(2, 9))
    assert rows["liver_0"]["liver_dice"] == 1


@pytest.mark.parametrize(
    "words", [("liver=0",), ("liver=spleen",), ("liver=1,x",), ("=1",), ("7",)]
)
@BLANK
def test_classes_that_cannot_be_are_refused(folders, words):
    with pytest.raises(InputError, match="--labels"):
        run_evaluation(*folders, labels=words)


def test_what_nobody_judged_counts_nowhere():
    predicted, truth = blobs(1), blobs(2)
    unknown = ball(truth.shape, (10, 10, 10), 6)
    truth[unknown] = IGNORED
    row = evaluate(as_volume(predicted, AFFINE), as_volume(truth, AFFINE), NAMES)
    predicted[unknown] = truth[unknown] = 0
    known = evaluate(as_volume(predicted, AFFINE), as_volume(truth, AFFINE), NAMES)
    assert row["liver_dice"] == known["liver_dice"]
    right = np.count_nonzero((predicted == truth) & ~unknown) / np.count_nonzero(~unknown)
    assert row["accuracy"] == pytest.approx(right)


@BLANK
def test_no_equal_name_is_an_error(folders):
    for path in folders[0].iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(InputError, match="called like"):
        run_evaluation(*folders)


@BLANK
def test_the_evaluation_works_alone(folders, capsys):
    assert run_here("-m", "data.evaluate", "--help") == 0
    assert "PREDICTIONS" in capsys.readouterr().out.upper()
    done = run_script("-m", "data.evaluate", *folders, "--destination", folders[0].parent / "out")
    assert done.returncode == 0, done.stderr
    assert "mean ± SD" in done.stdout
    (folders[0] / "liver_0.nii.gz").write_text("")
    out = folders[0].parent / "out"
    ended = run_here("-m", "data.evaluate", *folders, "--destination", out)
    assert "liver_0.nii.gz" in str(ended)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2])
def test_the_printed_summary_is_what_a_careful_person_writes(capsys, count):
    name = "a class with a rather long name"
    rows = [
        {"case": f"case{n}", **evaluate(*(as_volume(blobs(n + m), AFFINE) for m in (0, 1)), [name])}
        for n in range(count)
    ]
    for row in rows:
        row[f"{name}_volume_error_percent"] = -123456.789
    print_summary(summarise(rows, [name]), [name])
    header, *lines = capsys.readouterr().out.splitlines()
    assert ("± 0." in "".join(lines)) == (count > 1)
    for line in lines[:4]:
        assert len(line.removeprefix(name).replace(" ± ", "±").split()) == 6, line
    assert "SD 0.000" not in header


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1"])
def test_a_spreadsheet_runs_nothing(tmp_path, name):
    write_table([{"case": name, "value": -1.5, "none": None}], tmp_path / "t.csv")
    (row,) = csv.DictReader((tmp_path / "t.csv").open(newline=""))
    assert row == {"case": f"'{name}", "value": "-1.5", "none": ""}


def test_truths_that_are_not_there_are_named(tmp_path):
    """Also where their number is wrong for that very reason: one folder for many scans."""
    scans = [tmp_path / f"{name}.nii.gz" for name in "abc"]
    with pytest.raises(InputError, match="none: no such file or folder"):
        pair_truths(scans, [tmp_path / "none"])
