"""Tests of prepare.py and the check: bad cases, full disks, foreign files, signals, settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_script
from helpers import call_script, ras_arrays, read_voxels, run, save_case, write_patients

import prepare
from data import check
from data.files import InputError
from data.settings import human_bytes
from prepare import Config

TWO = {"training": 0.5, "validation": 0.5, "test": 0.0}  # splits for two patients


def test_copies_share_two_slices_and_a_tenth_of_the_shorter_scan():
    whole = list(range(100))
    scans = [whole, whole[40:50], [*whole[:1], *range(200, 204)], [*whole[:9], *range(300, 400)]]
    assert check.find_duplicates(scans) == [(0, 1, 10)]


def test_mr_is_said_once_and_kept(tmp_path):
    for index in range(3):
        scan, label = (array[:, :, 12:24] for array in ras_arrays(index))
        save_case(tmp_path / "raw", f"case_{index}", np.abs(scan) % 255, label)
    dataset = run(tmp_path / "raw", modality="MR", accept=("outline",))
    assert dataset["settings"]["modality"] == "MR"
    assert "−1000" not in str(dataset["cases"])
    piece = read_voxels(tmp_path / "prepared" / dataset["subvolumes"][0]["image"])
    assert not piece[:, :, 12:].any()  # padded with 0, not with air's HU


def test_an_accepted_finding_is_repeated(raw):
    save_case(raw, "case_0", ras_arrays(0)[0], ras_arrays(0)[1][::-1])
    out = raw.parent / "prepared"
    with pytest.raises(InputError, match="1 of 3 cases have errors"):
        run(raw, destination=raw.parent / "other", accept=("hu",), check_only=True)
    prepare.main(Config(raw, out, workers=1, check_only=True, accept=("outline",)))
    assert len(list((out / "check").glob("*.png"))) == 3
    assert not (out / "subvolumes").exists()  # nothing is cut by --check-only
    case = run(raw, accept=("outline",))["cases"][0]
    assert case["accepted"] == ["outline"]
    assert "mirrored left-right" in " ".join(case["warnings"])


def test_liver_that_would_be_lost_stops_everything(raw, monkeypatch):
    cuts = prepare.list_cuts
    monkeypatch.setattr(prepare, "list_cuts", lambda *given: cuts(*given)[:1])
    with pytest.raises(RuntimeError, match="covered: a fault of prepare"):
        run(raw)
    assert not (raw.parent / "prepared/dataset.json").exists()


def test_the_check_works_alone(raw, tmp_path):
    save_case(raw, "case_1", *(array[:, :, 20:21] for array in ras_arrays(1)))  # drawn too
    command = ("-m", "data.check", raw, "--destination", tmp_path / "out")
    done = call_script(*command)
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in (tmp_path / "out/check").iterdir() if path.suffix != ".json"}
    assert names == {"check.csv", "case_0.png", "case_1.png", "case_2.png"}
    assert (tmp_path / "out/check/check.csv").read_text().startswith("case,shape,spacing mm")
    save_case(raw, "case_1", *(array[24:25] for array in ras_arrays(1)))
    done = call_script(*command)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "1 of 3 cases have errors" in done.stderr


@pytest.mark.parametrize(("stage", "step"), [(check, "read_pair"), (prepare, "choose_frame")])
def test_whatever_a_case_raises_the_others_are_done(stage, step, raw, monkeypatch, capsys):
    real = getattr(stage, step)

    def broken(case, *others):  # its record, or its scan
        if "case_1" in str(getattr(case, "name", case)):
            raise MemoryError("huge")
        return real(case, *others)

    monkeypatch.setattr(stage, step, broken)
    with pytest.raises(InputError, match="1 of 3 cases have errors"):
        run(raw, crop_to_body=True, **TWO)
    assert "error: case_1: MemoryError: huge" in capsys.readouterr().out
    written = json.loads((raw.parent / "prepared/dataset.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["case_0", "case_2"]
    monkeypatch.undo()
    again = run(raw, crop_to_body=True, **TWO)["cases"]
    assert len(again) == 3, "no verdict on the scan was remembered"


def test_a_full_disk_is_no_verdict_on_a_scan(raw, monkeypatch):
    def fill(*_, **__):
        raise InputError("case_0.png: No space left on device")

    for module, function in ((check.pictures, "save_figure"), (prepare, "write_json")):
        real = getattr(module, function)
        fail = lambda x, p, real=real: (fill if "case_" in p.name else real)(x, p)  # noqa: E731
        monkeypatch.setattr(module, function, fail)
        with pytest.raises(InputError, match="No space left on device"):
            run(raw, pictures=True)
        assert not list((raw.parent / "prepared").rglob("case_*.json"))
        monkeypatch.undo()
    assert len(run(raw)["cases"]) == 3


def test_a_disk_that_is_too_small_is_told_after_the_first_case(raw, monkeypatch, capsys):
    """What the first scan takes tells what the two others take, by their voxels."""
    made = run(raw, subvolume_depth=0)
    first, *others = (np.prod(case["shape"]) for case in made["cases"])
    size = sum(made["subvolumes"][0][f"{key}_bytes"] for key in ("image", "label"))
    size = human_bytes(size * sum(others) / first)
    assert f"about {size} more for 3 cases" in capsys.readouterr().out
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=512))
    with pytest.raises(InputError, match=rf"{size} more for 3 cases, but 512B are free; free"):
        run(raw, destination=raw.parent / "other", subvolume_depth=0)


def test_another_source_is_refused_and_overwrite_removes_only_ours(raw, tmp_path):
    run(raw)
    other = write_patients(tmp_path / "other", affines=(None,) * 4)
    for path in sorted(other.rglob("*.nii.gz")):
        path.rename(path.with_name(f"other_{path.name}"))
    mine = [tmp_path / "prepared" / name for name in ("notes.txt", "subvolumes/mine/a.nii")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    with pytest.raises(InputError, match=r"was prepared from .*raw.*--overwrite"):
        run(other)
    assert run(other, overwrite=True)["source"] == str(other)
    for folder in ("imagesTr", "labelsTr"):
        (other / folder / "other_case_3.nii.gz").unlink()
    assert len(run(other)["cases"]) == 3  # case 3 has left the source
    names = {path.name for path in (tmp_path / "prepared/subvolumes").iterdir()}
    assert names == {"mine", "other_case_0", "other_case_1", "other_case_2"}
    assert all(path.is_file() for path in mine)


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_that_is_not_ours_is_not_replaced(finished, raw):
    precious = raw.parent / "prepared/subvolumes/case_1/precious.txt"
    if finished:  # by an earlier run, with another setting
        run(raw, compress=True)
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("")
    with pytest.raises(InputError, match="did not write"):
        run(raw)
    assert precious.is_file()


def test_only_leftovers_of_killed_runs_are_removed(raw, tmp_path):
    out = tmp_path / "prepared"
    unfinished = out / "subvolumes/.prepare_unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "link").symlink_to(raw)
    names = {".7.partial.dataset.json": False, ".notes.partial.txt": True, ".hidden": True}
    for name in names:
        (out / name).write_text("")
    assert len(run(raw)["cases"]) == 3
    assert {name: (out / name).exists() for name in names} == names
    assert not unfinished.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_in_a_command_without_tracebacks(workers, tmp_path):
    raw, out = write_patients(tmp_path / "raw", affines=(None,) * 6), tmp_path / "out"
    command = [sys.executable, "prepare.py", raw, "--destination", out, "--workers", str(workers)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe)
    while not list(out.glob("check/*.png")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT if workers == 2 else signal.SIGTERM)  # as a terminal does
    _, told = process.communicate(timeout=300)
    assert (process.returncode, "Traceback" in told) == (130, False), told
    last = told.strip().splitlines()[-1]
    assert last == f"python prepare.py {raw} --destination {out} --workers {workers}"
    assert not list(out.rglob("*partial*"))


def test_where_no_process_can_be_started_one_does_all(raw, tmp_path, monkeypatch):
    (place := tmp_path / ("long" * 30)).mkdir()  # the path of a socket has 108 letters at most
    monkeypatch.setenv("TMPDIR", str(place))
    done = run_script("prepare.py", raw, "--destination", tmp_path / "out", "--workers", 2)
    assert "AF_UNIX path too long" in done.stdout


def test_a_worker_that_the_system_ends_is_told(raw, monkeypatch):
    monkeypatch.setattr(prepare, "end_with_parent", os.abort)
    with pytest.raises(InputError, match="most likely for memory; run again with fewer --workers"):
        run(raw, workers=2)


def test_settings_that_cannot_be_are_refused_before_anything_is_read(tmp_path):
    source, out = tmp_path / "missing", tmp_path / "out"
    for settings, text in (
        ({"workers": -1}, "--workers"), ({"folds": 1}, "--folds must be 2 or more, got 1"),
        ({"training": 0.5}, "add up to 1"), ({"training": float("nan")}, "--training"),
        ({"patient_pattern": "("}, "--patient-pattern"), ({"values": ("liver=x",)}, "--values"),
        ({"crop_to_body": True, "modality": "MR"}, "--crop-to-body"),
        ({"crop_to_body": True, "subvolume_depth": 0}, "--crop-to-body"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(text)):
            prepare.main(Config(source=source, destination=out, **settings))


def test_leaving_out_is_told_and_never_everything(raw, capsys):
    with pytest.raises(InputError, match="names all 3 cases"):
        run(raw, leave_out=("case_0", "case_1", "case_2"))
    run(raw, leave_out=("case_1", "case_7", "case_8"), **TWO)
    assert "--leave-out: there is no such case: case_7, case_8" in capsys.readouterr().out
    run(raw, leave_out=("case_1",), subvolume_depth=0, **TWO)
    assert "next: python train.py laptop --data" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["dataset.json", "--values"])
def test_names_decide_what_is_liver_and_what_is_ignored(by, raw):
    names = {"background": 0, "spleen": 1, "liver": 6, "ignore": 3}
    settings = {"values": [f"{name}={value}" for name, value in names.items()]}
    if by == "dataset.json":
        (raw / "dataset.json").write_text(json.dumps({"labels": names}))
        settings = {}
    for index in range(3):
        label = np.array([0, 6, 1], np.uint8)[ras_arrays(index)[1]]
        label[:4] = 3
        save_case(raw, f"case_{index}", ras_arrays(index)[0], label)
    dataset = run(raw, **settings)
    assert (dataset["foreground"], dataset["ignore"]) == ([6], [3])
    assert dataset["labels"] == {"background": 0, "spleen": 1, "liver": 6}
    for index, case in enumerate(dataset["cases"]):
        assert case["foreground_voxels"] == np.count_nonzero(ras_arrays(index)[1][4:] == 1)
    entry = dataset["subvolumes"][0]
    piece = read_voxels(raw.parent / "prepared" / entry["label"])
    assert (piece[:4] == 3).all() and entry["voxels_per_label"]["3"] == (piece == 3).sum()


def test_slices_between_the_annotated_ones_are_ignored(raw, capsys):
    with pytest.raises(InputError, match="3 of 3 cases"):
        run(raw, label_every=4, check_only=True)
    assert "--label-every 4, but slices" in capsys.readouterr().out
    for index in range(3):
        scan, label = ras_arrays(index)
        drawn = np.arange(label.shape[2]) % 4 == index
        save_case(raw, f"case_{index}", scan, label * drawn)
    dataset = run(raw, label_every=4)
    assert dataset["ignore"] == [255]
    for entry in dataset["subvolumes"]:
        index, first = int(entry["case"][-1]), entry["first_slice"]
        piece = read_voxels(raw.parent / "prepared" / entry["label"])
        for z in range(16):
            whole = ras_arrays(index)[1][:, :, first + z]
            assert (piece[:, :, z] == (whole if (first + z - index) % 4 == 0 else 255)).all()
