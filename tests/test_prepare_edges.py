"""prepare.py and the check at their edges: bad cases, full disks, foreign files, cut-off pieces."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import psutil
import pytest
from conftest import ROOT
from helpers import call_script, ras_arrays, run, save, write_patients

import prepare
import prepare as destination
from data import check
from data import check as copies
from data.check import judge_hu
from data.files import InputError, lock_folder
from prepare import Config

AFFINE = np.diag([-5.0, -5, 5, 1])


@pytest.fixture
def raw(tmp_path):
    return write_patients(tmp_path / "raw")


# ---------------------------------------------------------------------------------------
# One scan under two names
# ---------------------------------------------------------------------------------------


def synthetic_marks(number: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Marks of scans; every tenth is a crop, every 15th a noisy copy of the one before it."""
    rng, marks = np.random.default_rng(seed), []
    for index in range(number):
        coarse = np.kron(rng.integers(-200, 250, (4, 4, 4)), np.ones((4, 4, 4), int)).ravel()
        mark = {"slices": rng.integers(0, 2**32, 40).tolist(), "picture": coarse.tolist()}
        if index % 10 == 9:
            mark["slices"] = marks[-1]["slices"][10:30]
        elif index % 15 == 14:
            noise = rng.integers(-20, 20, coarse.size)
            mark["picture"] = (np.array(marks[-1]["picture"]) + noise).tolist()
        marks.append(mark)
    return marks


def compare_all_pairs(marks: list[dict[str, list[int]]]) -> list[tuple[int, int, str]]:
    """The plain rule: every pair by its slices, else by its look."""
    found = []
    for j in range(len(marks)):
        for i in range(j):
            one, other = marks[i], marks[j]
            shared = len(set(one["slices"]) & set(other["slices"]))
            alike = float(np.corrcoef(one["picture"], other["picture"])[0, 1])
            if shared > 1 and shared >= 0.1 * min(len(one["slices"]), len(other["slices"])):
                found.append((i, j, f"{shared} slices are identical"))
            elif alike > copies.ALIKE:
                found.append((i, j, f"correlation {alike:.4f}"))
    return sorted(found)


def test_duplicates_are_those_of_the_plain_rule():
    marks = [*synthetic_marks(60), {"slices": [], "picture": [40] * 4096}]
    expected = compare_all_pairs(marks)
    assert len(expected) == 8
    assert copies.find_duplicates(marks) == expected
    assert copies.find_duplicates(marks[:1]) == copies.find_duplicates([]) == []


def test_two_thousand_scans_are_not_compared_pair_by_pair(monkeypatch):
    compared, real = [], copies.correlate

    def counted(units, pairs):
        compared.append(len(pairs))
        return real(units, pairs)

    monkeypatch.setattr(copies, "correlate", counted)
    found = copies.find_duplicates(synthetic_marks(2000))
    assert len(found) == 200 + 67
    assert sum(compared) < 4000  # of 2 million pairs


# ---------------------------------------------------------------------------------------
# Judgements
# ---------------------------------------------------------------------------------------


def test_padding_read_as_hu_is_no_ct():
    scan = ras_arrays(0)[0].astype(np.int32)
    assert judge_hu(scan, scan.dtype) == []
    scan[:8] = 62512
    assert judge_hu(scan, scan.dtype)[0][0] == "hu"


def test_mr_is_said_once_and_kept(tmp_path):
    for index in range(3):
        scan, label = (array[:, :, 12:24] for array in ras_arrays(index))
        save(np.abs(scan) % 255, AFFINE, tmp_path / f"raw/imagesTr/case_{index}.nii.gz")
        save(label, AFFINE, tmp_path / f"raw/labelsTr/case_{index}.nii.gz")
    with pytest.raises(InputError, match="3 of 3 cases"):
        run(tmp_path / "raw", check_only=True)
    dataset = run(tmp_path / "raw", modality="MR", accept=("mirrored",))
    assert dataset["settings"]["modality"] == "MR"
    told = " ".join(text for case in dataset["cases"] for text in case["warnings"])
    assert "HU" not in told.replace("HU spread", "") and "−1000" not in told
    piece = nib.load(tmp_path / "prepared" / dataset["subvolumes"][0]["image"])
    assert not np.asanyarray(piece.dataobj)[:, :, 12:].any()  # padded with 0, not with air's HU


def test_swapped_scan_and_label_map_are_told(tmp_path, capsys):
    scan, label = ras_arrays(0)
    save(label, AFFINE, tmp_path / "raw/imagesTr/case.nii.gz")
    save(scan, AFFINE, tmp_path / "raw/labelsTr/case.nii.gz")
    with pytest.raises(InputError, match="1 of 1 cases"):
        run(tmp_path / "raw", check_only=True)
    assert "are scan and label map swapped?" in capsys.readouterr().out


def test_an_accepted_finding_is_repeated(tmp_path):
    raw = write_patients(tmp_path / "raw")
    scan, label = ras_arrays(0)
    save(label[::-1], AFFINE, raw / "labelsTr/case_0.nii.gz")
    save(scan, AFFINE, raw / "imagesTr/case_0.nii.gz")
    case = run(raw, accept=("mirrored",))["cases"][0]
    assert case["accepted"] == ["mirrored"]
    assert "mirror image" in " ".join(case["warnings"])


def test_the_table_is_also_a_file_and_its_columns_never_touch(raw, capsys):
    (raw / "imagesTr/case_0.nii.gz").rename(raw / f"imagesTr/{'long_name_' * 6}.nii.gz")
    (raw / "labelsTr/case_0.nii.gz").rename(raw / f"labelsTr/{'long_name_' * 6}.nii.gz")
    (raw / "labelsTr/case_1.nii.gz").unlink()
    with pytest.raises(InputError):
        run(raw, check_only=True)
    lines = capsys.readouterr().out.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("case "))
    assert (
        len({len(re.split(r" {2,}", line)) for line in (lines[head], *lines[head + 2 : head + 4])})
        == 1
    )
    assert any(line.endswith("1 error") for line in lines)
    table = (raw.parent / "prepared/check/check.csv").read_text().splitlines()
    assert len(table) == 4 and table[0].startswith("case,shape,spacing mm")


# ---------------------------------------------------------------------------------------
# One bad case, and what is remembered
# ---------------------------------------------------------------------------------------

FAULTS = (IndexError("index 0"), MemoryError("huge"), UnicodeError("name"), RuntimeError("library"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("stage", ["check", "cut"])
def test_whatever_a_case_raises_the_others_are_done(fault, stage, raw, monkeypatch, capsys):
    module = check if stage == "check" else prepare
    real = module.read_scan

    def broken(path):
        if "case_1" in str(path):
            raise fault
        return real(path)

    monkeypatch.setattr(module, "read_scan", broken)
    two = {"training": 0.5, "validation": 0.5, "test": 0.0}
    with pytest.raises(InputError, match="1 of 3 cases have errors"):
        run(raw, **two)
    assert f"error: case_1: {type(fault).__name__}: {fault}" in capsys.readouterr().out
    written = json.loads((raw.parent / "prepared/dataset.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["case_0", "case_2"]
    monkeypatch.undo()
    assert len(run(raw, **two)["cases"]) == 3  # no verdict on the scan was remembered


def test_a_scan_of_air_with_a_label_is_a_finding(tmp_path):
    scan, label = ras_arrays(0)
    save(np.full_like(scan, -1000), AFFINE, tmp_path / "raw/imagesTr/case.nii.gz")
    save(label, AFFINE, tmp_path / "raw/labelsTr/case.nii.gz")
    with pytest.raises(InputError, match="1 of 1 cases"):
        run(tmp_path / "raw")


@pytest.mark.parametrize("what", ["picture", "record"])
def test_a_full_disk_is_no_verdict_on_a_scan(what, raw, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if what == "picture":
        monkeypatch.setattr(prepare, "draw_overlay", full)
    else:
        monkeypatch.setattr(prepare, "write_signed", full)
    with pytest.raises(InputError, match="No space left on device"):
        run(raw, pictures=True)
    assert not list((raw.parent / "prepared").rglob("case_*.json"))
    monkeypatch.undo()
    assert len(run(raw)["cases"]) == 3


def test_records_that_are_damaged_are_made_again(raw):
    run(raw)
    prepared = raw.parent / "prepared"
    for index, content in enumerate(("", "[1]", '{"fingerprint": 1')):
        (prepared / f"check/case_{index}.json").write_text(content)
        (prepared / f"subvolumes/case_{index}/case.json").write_text(content)
    assert len(run(raw)["cases"]) == 3


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize(
    "harm",
    [flip_a_byte, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink()],
    ids=["flipped", "cut off", "deleted"],
)
def test_a_harmed_subvolume_is_cut_again(key, harm, raw):
    entry = run(raw)["subvolumes"][0]
    path = raw.parent / "prepared" / entry[key]
    before = path.read_bytes()
    assert int(entry[f"{key}_crc32"], 16) == zlib.crc32(before)
    assert entry[f"{key}_bytes"] == len(before)
    harm(path)
    record = path.parent / "case.json"
    if path.exists():  # later than the record, on any clock
        os.utime(path, ns=(0, record.stat().st_mtime_ns + 1))
    run(raw)
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------------------
# The destination
# ---------------------------------------------------------------------------------------


def test_another_source_is_refused_and_overwrite_removes_only_ours(raw, tmp_path):
    first = run(raw)
    other = write_patients(tmp_path / "other", affines=(None,) * 3)
    for folder in ("imagesTr", "labelsTr"):
        for path in sorted((other / folder).iterdir()):
            path.rename(path.with_name(f"other_{path.name}"))
    mine = [tmp_path / "prepared" / name for name in ("notes.txt", "subvolumes/mine/a.nii")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    with pytest.raises(InputError, match=r"was prepared from .*raw.*--overwrite"):
        run(other)
    dataset = run(other, overwrite=True)
    assert dataset["source"] == str(other) != first["source"]
    names = {path.name for path in (tmp_path / "prepared/subvolumes").iterdir()}
    assert names == {"mine", "other_case_0", "other_case_1", "other_case_2"}
    assert all(path.is_file() for path in mine)


def test_cases_that_left_the_source_leave_the_destination(tmp_path):
    raw = write_patients(tmp_path / "raw", affines=(None,) * 4)
    run(raw)
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder / "case_3.nii.gz").unlink()
    run(raw)
    names = {path.stem for path in (tmp_path / "prepared").rglob("case_*") if path.stem != "case"}
    assert names == {"case_0", "case_1", "case_2"}


def test_a_folder_that_is_not_ours_is_not_replaced(raw):
    folder = raw.parent / "prepared/subvolumes/case_1"
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("")
    with pytest.raises(InputError, match="did not write it"):
        run(raw)
    assert (folder / "precious.txt").is_file()


@pytest.fixture
def zombie():
    """A process that has ended and whose parent has not asked how: its number is still taken."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield psutil.Process(process.pid)
    process.wait()


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs processes as of POSIX")
def test_only_leftovers_of_dead_processes_are_removed(zombie, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        f".{ended.pid}.partial.dataset.json": False,
        f".{zombie.pid}.partial.dataset.json": False,
        f".{os.getpid()}.partial.dataset.json": True,
        ".notes.partial.txt": True,
        ".hidden": True,
    }
    for name in names:
        (tmp_path / name).write_text("")
    destination.remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_second_prepare_into_a_folder_is_refused(raw):
    destination = raw.parent / "prepared"
    with lock_folder(destination), pytest.raises(InputError, match="another process writes here"):
        run(raw)
    assert not list(destination.rglob("*.json"))
    assert len(run(raw)["cases"]) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_in_a_command_without_tracebacks(workers, tmp_path):
    raw = write_patients(tmp_path / "raw", affines=(None,) * 6)
    out = tmp_path / "out"
    command = [sys.executable, "prepare.py", raw, "--destination", out, "--workers", workers]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not list(out.glob("check/*.png")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT if workers == 2 else signal.SIGTERM)  # as a terminal does
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert last == f"python prepare.py {raw} --destination {out} --workers {workers}"
    assert not list(out.rglob("*partial*"))


# ---------------------------------------------------------------------------------------
# Settings and splits
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep_empty": 2.0}, "--keep-empty"),
        ({"subvolume_depth": -1}, "--subvolume-depth"),
        ({"workers": -1}, "--workers"),
        ({"label_every": 0}, "--label-every"),
        ({"folds": 1}, "--folds must be 2 or more, got 1"),
        ({"training": 0.5}, "add up to 1"),
        ({"training": float("nan")}, "--training"),
        ({"patient_pattern": "("}, "--patient-pattern"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(settings, text, tmp_path):
    with pytest.raises(InputError, match=re.escape(text)):
        prepare.main(Config(source=tmp_path / "missing", destination=tmp_path / "out", **settings))


@pytest.mark.parametrize("words", [("liver",), ("=1",), ("liver=x",), ("a=1", "b=1"), ("a=70000",)])
def test_values_must_be_names_with_values(words):
    with pytest.raises(InputError, match="--values"):
        check.parse_values(words)
    assert check.parse_values(("liver=6", "tumour=7,8")) == {"liver": (6,), "tumour": (7, 8)}


def test_a_split_without_validation_must_be_wanted(raw, capsys):
    given = raw.parent / "split.json"
    given.write_text(json.dumps({"training": ["case_0", "case_1"], "test": ["case_2"]}))
    with pytest.raises(InputError, match="no patient into validation"):
        run(raw, split=given)
    assert not (raw.parent / "prepared/subvolumes").exists()
    run(raw, split=given, training=1.0, validation=0.0, test=0.0)
    run(raw, training=0.5, validation=0.0, test=0.5)
    assert capsys.readouterr().out.count("--validation 0:") == 1


def test_leaving_out_is_told_and_never_everything(raw, capsys):
    with pytest.raises(InputError, match="names all 3 cases"):
        run(raw, leave_out=("case_0", "case_1", "case_2"))
    two = {"training": 0.5, "validation": 0.5, "test": 0.0}
    run(raw, leave_out=("case_1", "case_7"), pictures=True, **two)
    told = capsys.readouterr().out
    assert "--leave-out case_7: there is no such case" in told
    assert "next: python preprocess.py --data" in told and "look at" in told
    run(raw, leave_out=("case_1",), subvolume_depth=0, **two)
    assert "next: python train.py laptop --data" in capsys.readouterr().out


def test_pairs_are_listed_before_the_check(raw, capsys):
    prepare.main(
        Config(source=raw, destination=raw.parent / "prepared", workers=1, check_only=True)
    )
    lines = capsys.readouterr().out.splitlines()
    assert "3 scans with label maps" in lines[0]
    assert [line.strip().partition(":")[0] for line in lines[1:4]] == ["case_0", "case_1", "case_2"]


# ---------------------------------------------------------------------------------------
# Names decide; partly labelled data
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["dataset.json", "--values"])
def test_liver_is_liver_whatever_its_value(by, tmp_path):
    raw = write_patients(tmp_path / "raw")
    for index in range(3):
        label = np.array([0, 6, 1], np.uint8)[ras_arrays(index)[1]]
        save(label, AFFINE, raw / f"labelsTr/case_{index}.nii.gz")
        save(ras_arrays(index)[0], AFFINE, raw / f"imagesTr/case_{index}.nii.gz")
    settings = {"values": ("background=0", "spleen=1", "liver=6")}
    if by == "dataset.json":
        names = {"0": "background", "1": "spleen", "6": "liver"}
        (raw / "dataset.json").write_text(json.dumps({"labels": names}))
        settings = {}
    dataset = run(raw, **settings)
    assert dataset["foreground"] == [6]
    assert dataset["labels"] == {"background": 0, "spleen": 1, "liver": 6}
    for index, case in enumerate(dataset["cases"]):
        assert case["foreground_voxels"] == np.count_nonzero(ras_arrays(index)[1] == 1)


@pytest.mark.parametrize("by", ["dataset.json", "--values"])
def test_values_nobody_judged_pass_through(raw, by):
    names = {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}
    settings = {"values": [f"{name}={value}" for name, value in names.items()]}
    if by == "dataset.json":
        (raw / "dataset.json").write_text(json.dumps({"labels": names}))
        settings = {}
    else:
        with pytest.raises(InputError, match="--values ignore=0: 0 is the background"):
            run(raw, values=("liver=1", "ignore=0"))
    scan, label = ras_arrays(0)
    label = label.copy()
    label[:4] = 3
    save(label, AFFINE, raw / "labelsTr/case_0.nii.gz")
    save(scan, AFFINE, raw / "imagesTr/case_0.nii.gz")
    dataset = run(raw, **settings)
    assert dataset["ignore"] == [3] and "ignore" not in dataset["labels"]
    entry = next(e for e in dataset["subvolumes"] if e["case"] == "case_0")
    piece = np.asanyarray(nib.load(raw.parent / "prepared" / entry["label"]).dataobj)
    assert (piece[:4] == 3).all() and entry["voxels_per_label"]["3"] == (piece == 3).sum()


def test_slices_between_the_drawn_ones_are_not_judged(raw, capsys):
    with pytest.raises(InputError, match="3 of 3 cases"):
        run(raw, label_every=4, check_only=True)
    assert "--label-every 4, but slices" in capsys.readouterr().out
    for index in range(3):
        scan, label = ras_arrays(index)
        sparse = np.zeros_like(label)
        sparse[:, :, index::4] = label[:, :, index::4]
        save(sparse, AFFINE, raw / f"labelsTr/case_{index}.nii.gz")
        save(scan, AFFINE, raw / f"imagesTr/case_{index}.nii.gz")
    dataset = run(raw, label_every=4)
    assert dataset["ignore"] == [255]
    for entry in dataset["subvolumes"]:
        index, first = int(entry["case"][-1]), entry["first_slice"]
        piece = np.asanyarray(nib.load(raw.parent / "prepared" / entry["label"]).dataobj)
        whole = ras_arrays(index)[1][:, :, first : first + 16]
        for z in range(16):
            expected = whole[:, :, z] if (first + z - index) % 4 == 0 else 255
            assert (piece[:, :, z] == expected).all()


# ---------------------------------------------------------------------------------------
# Alone
# ---------------------------------------------------------------------------------------


def test_the_check_works_alone(raw, tmp_path):
    command = ("-m", "data.check", raw, "--destination", tmp_path / "out")
    done = call_script(*command)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert f"next: python prepare.py {raw}" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"check.csv", "case_0.png", "case_1.png", "case_2.png"}
    (raw / "labelsTr/case_1.nii.gz").unlink()
    done = call_script(*command)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "1 of 3 cases with errors" in done.stderr
    done = call_script("-m", "data.check", tmp_path / "missing")
    assert done.returncode == 1 and str(tmp_path / "missing") in done.stderr


def test_the_check_has_a_help_of_its_own():
    done = call_script("-m", "data.check", "--help")
    told = done.stdout
    assert done.returncode == 0
    assert "--trust-image-grid" in told and "python -m data.check" in told
