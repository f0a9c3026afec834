"""Break the product on purpose, one text at a time: each time the named test must fail.

    python tests/mutations.py [--only WORD] [--workers 2]

A line of MUTATIONS has four parts: a file, a text that stands there once, a wrong text, and a test,
named by its file and by words of its name that no other test there has. `\\n` is a line break.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = r"""
preprocess | sd = augment. | sd = 20 * augment. | training::as_strong
preprocess | 1 + augment.scaling * | 1 + 10 * augment.scaling * | training::as_strong
preprocess | (augment.translation * size | (0 * size | training::as_strong
preprocess | slices += shift * | slices += 0 * | training::as_strong
preprocess | slices *= 1 + gain * | slices *= 1 + 0 * | training::as_strong
preprocess | scale[0] *= -1 | scale[1] *= -1 | training::as_strong
preprocess | (slices, grid, mode | (slices, grid * (1 + len(made) / 9), mode | training::as_strong
preprocess | default_rng([self.seed, self.epoch]) | default_rng([self.seed]) | training::depends_on
preprocess | default_rng([self.seed, self.epoch]) | default_rng([self.epoch]) | training::depends_on
preprocess | [[self.seed, self.epoch, i | [[self.seed, i | training::depends_on
preprocess | [[self.seed, self.epoch, i | [[self.epoch, i | training::depends_on
preprocess | "nearest", "nearest-exact" | "nearest", "nearest" | geometry::chain_equals
preprocess | part.stop) + to_network[axis, 3] | part.stop) | geometry::landmark
preprocess | to_network[:2, 3] -= | to_network[:2, 3] -= 0 * | geometry::cropped_to_the_body
preprocess | item[INDICES][chosen] | item[INDICES][0] | recipes::rare_class
preprocess | ["subvolumes"] if record["split"] == split] | ["subvolumes"]] | training::begins_with
preprocess | half * unknown | 0 * unknown | ignored::between_two_slices
preprocess | torch.Generator(slices.device) | torch.Generator() | cuda::pretended_gpu
preprocess | stream.wait_event(used) | pass | cuda::pretended_gpu
preprocess | .to(device, non_blocking=on_gpu) | .to(device) | cuda::pretended_gpu
utilities | run.scheduler.step() | pass | run_memory::at_the_rate
utilities | group["lr"] = rate | pass | run_memory::at_the_rate
utilities | run.network.train() | pass | training::train_mode
utilities | run.kept.eval()\n    names | names | training::train_mode
utilities | nn.utils.clip_grad_norm_(run.model.parameters(), clip) | pass | ignored::clipped
utilities | (m.parameters(), m.buffers()) | (m.parameters(),) | ignored::clipped
utilities | torch.set_rng_state(resume["random"].cpu()) | pass | training::control_c
utilities | set_epoch(epoch, len(run.losses)) | set_epoch(epoch) | training::control_c
utilities | ("model", "optimizer", | ("model", | training::share_of_the_pretrained
utilities | v.lerp(old, share) | v.lerp(old, 1 - share) | training::share_of_the_pretrained
utilities | if not math.isfinite(value): | if False: | training::non_finite
utilities | patients[case] += | patients[len(patients)] += | ignored::voxels_out
utilities | (logits).masked_fill(label | (logits).masked_fill(0 * label | ignored::voxels_out
utilities | .detach()).masked_fill(label | .detach()).masked_fill(0 * label | ignored::voxels_out
utilities | run.share_buffers() | pass | engine::two_processes
utilities | parallel(self.model) if dist.is_initialized() else self. | self. | engine::two_processes
utilities | elif not torch.isfinite(tensor).all(): | elif False: | run_memory::other_content
utilities | if damaged := archive.testzip(): | if damaged := "": | runs::one_flipped_bit
train | 0.5 * (1 + math.cos(math.pi * progress)) | 1.0 | run_memory::at_the_rate
train | (1 - progress) ** 0.9 | 1.0 | run_memory::at_the_rate
train | include_background=False | include_background=True | network::by_hand
train | batch=True) | batch=False) | network::by_hand
train | alpha=0.3, beta=0.7 | alpha=0.7, beta=0.3 | network::by_hand
train | weight=weights, lambda_dice=0.0 | lambda_dice=0.0 | network::cross_entropy
train | ** -0.5 | ** -1.0 | run_memory::nobody_judged
train | config.patches_per_case if patches | 1 if patches | training::begins_with
train | torch.manual_seed(config.seed) | torch.manual_seed(0) | training::begins_with
train | augment, config.seed, repeats | augment, 0, repeats | training::begins_with
train | shuffle=True, seed=config.seed | shuffle=True, seed=0 | training::begins_with
train | shuffle=True | shuffle=False | training::begins_with
train | Subvolumes(cached, device | Subvolumes(cached, augment, device | training::begins_with
train | label != IGNORED, self.loss | label < 999, self.loss | ignored::loss_and_gradient
train | splits.refuse_other_data(saved | print(saved | run_memory::same_data_alone
train | splits.refuse_damaged(prepared, config.data, rank, size) | pass | run_memory::was_changed
train | if mine[n] != kept[n]} | if mine is kept} | training::keeps_its_settings
train | patients += made_it | pass | run_memory::bring_their_patients
data/pictures | -row["val_loss"]) | 0) | run_memory::of_equal_dice
data/pictures | [index][::-1, ::-1].T | [index][:, ::-1].T | pictures::on_the_left_of
data/splits | seeded(config.seed, name) | seeded(0, name) | prepare::split_sizes
data/splits | r["content"] in contents or ( | ( | run_memory::never_reported
data/splits | or (r["source"], r["patient"]) in names for | for | run_memory::averaged_folds
data/splits | case.patient = patient\n | case.patient = case.name\n | prepare::stay_together
data/splits | = first.setdefault(one, case.name) | = case.name | layouts::id_of_nobody
data/splits | split.setdefault(record["patient"], name) != name | False | prepare::must_not_leak
data/splits | {IGNORED, *prepared.get("ignore", ())} | set() | run_memory::nobody_judged
data/splits | SPLITS[record.get("fold") == fold] | SPLITS[0] | first_hour::every_case_is_validated
data/splits | ["cases"] if record["split"] == split] | ["cases"]] | apply::lie_on_the_scan
data/splits | places.setdefault(patient, here) != here | False | run_memory::dataset_json_that
data/evaluate | true == IGNORED | true == 254 | evaluation::ignored_voxels
data/evaluate | @ grid.ras_affine[:3, :3].T | * 1.0 | evaluation::agree_with_monai
data/evaluate | (ours - theirs) * grid | (theirs - ours) * grid | evaluation::agree_with_monai
data/evaluate | NSD_MM = 2.0 | NSD_MM = 3.0 | evaluation::agree_with_monai
data/evaluate | LESION_IOU = 0.1 | LESION_IOU = 0.12 | evaluation::is_matched
data/evaluate | LESION_IOU = 0.1 | LESION_IOU = 0.07 | evaluation::is_matched
data/evaluate | "_0_to_10_mm": (0, 10) | "_0_to_10_mm": (0, 9) | evaluation::is_matched
data/evaluate | "_10_to_20_mm": (10, | "_10_to_20_mm": (9, | evaluation::is_matched
data/evaluate | (dice >= 0.5) | (dice >= 0.1) | evaluation::is_matched
data/evaluate | / (predicted + true) | / (predicted + true).clip(1) | metrics::a_false_alarm
data/evaluate | "far": abs | "far": lambda v: v | evaluation::names_the_worst
data/trust | UNSURE = 0.73, 0.27 | UNSURE = 0.73, 0.33 | trust::two_thresholds
data/trust | UNSURE = 0.73, 0.27 | UNSURE = 0.67, 0.27 | trust::two_thresholds
data/trust | "good": 0.87 | "good": 0.8 | trust::number_falls
data/trust | "look": 0.75 | "look": 0.7 | trust::number_falls
data/trust | voxels * every * | voxels * | trust::knows_the_volumes
data/trust | ) if case["split"] == "training"] | )] | trust::knows_the_volumes
data/trust | if not case.get("cut")] | ] | trust::knows_the_volumes
data/volumes | np.linalg.det(self.affine[:3, :3]) | np.prod(self.spacing_mm) | evaluation::sheared
data/volumes | affine=moved, | affine=self.affine, | volumes::a_box
data/volumes | self.affine @ inv_ornt_aff( | self.affine + 0 * inv_ornt_aff( | volumes::all_48
data/volumes | TO_LPS = np.diag([-1.0 | TO_LPS = np.diag([1.0 | dicom_series::ordered_by_position
data/dicom | float(normal @ one.position)) | 0) | dicom_series::ordered_by_position
data/dicom | + np.float32(one.intercept) | + 0 | dicom_series::ordered_by_position
data/dicom | if apart and not own: | if False: | dicom_series::interleaved_scans
data/dicom | or ahead.max() > max(UNEVEN * spacing, | or -1 > max(0, | dicom_series::no_regular_grid
data/dicom | or sideways > max(TILT * spacing, rounding) | or -1 > 0 | dicom_series::no_regular_grid
data/scans | GRID_TOLERANCE = 0.5 | GRID_TOLERANCE = 0.6 | cases::half_a_voxel
data/scans | % every != 0] = IGNORED | % every != 0] = 0 | prepare_edges::between_the_annotated
data/seg | (is_tumour(one[0]), -one[2].size) | one[2].size | cases::tumours_win
data/labels | {"liver": ("liver", "tumour")} | {"liver": ("liver",)} | labels::the_default_learns
data/labels | classes if declared == own | classes if True | apply_inputs::read_by_its_names
data/labels | if len(found) == 1 else None | if found else None | labels::one_label_or_none
data/check | * spacing_mm[0] > 10 | * spacing_mm[0] > 999 | prepare_check::organs_are_doubted
data/check | judge_hu(coarse, scan.dtype) if | [] if | prepare_check::fault_in_the_voxels
data/check | record["patient"] = one["patient"] | pass | prepare_check::under_two_names
data/check | number > 1 and number | number | prepare_edges::copies_share
data/check | if finding[0] in accept else | if accept else | prepare_edges::an_accepted
prepare | if inside != covered: | if False: | prepare_edges::lost
prepare | AIR_HU if air else 0 | 0 | prepare::reaches_back
prepare | if empty and chosen | if chosen | prepare::and_subvolumes_without_it
prepare | (outline > 0).any(axis=2) | (outline > 9).any(axis=2) | prepare::cropped_to_the_body_no
apply_model | if where != "test" and not accepted: | if False: | run_memory::refused_by_its_voxels
apply_model | bool(config.accept) | True | run_memory::refused_by_its_voxels
apply_model | if seen and config.split != "training" and not | if not | run_memory::never_reported
apply_model | refuse_no_hu(found, case.image) | pass | apply::bad_input
apply_model | if options.largest_component and | if False and | evaluation::post_processing
apply_model | if options.fill_holes: | if False: | evaluation::post_processing
apply_model | (body if options.tumour_inside else part | (part | evaluation::post_processing
apply_model | batch.flip(3) | batch.flip(2) | apply_inputs::front_to_back
apply_model | / len(networks) | / 1 | apply_inputs::the_mean_of
apply_model | if not any(u.start | if True or any(u.start | apply_inputs::misses_the_organ
apply_model | if saved[key] != first[key]: | if False: | apply_inputs::are_not_averaged
apply_model | scan.from_ras(classes if | scan.like(classes if | geometry::every_orientation
"""
LOADED = ["pytest", "torch._dynamo", "monai.losses", "highdicom", "vedo"]
DIFFERS = 10  # what is added to pytest's exit code, which an exception's would equal


def read_mutations() -> list[tuple[str, str, str, str]]:
    """Return (file, old text, new text, test); raise ValueError where text or test is not there."""
    rows = []
    for line in MUTATIONS.strip().splitlines():
        name, old, new, test = (part.replace(r"\n", "\n") for part in line.split(" | "))
        path, words = test.split("::")
        text = (ROOT / "tests" / f"test_{path}.py").read_text(encoding="utf-8")
        tests = re.findall(rf"^def (test_\w*{words}\w*)", text, re.MULTILINE)
        if (ROOT / f"{name}.py").read_text(encoding="utf-8").count(old) != 1 or len(tests) != 1:
            raise ValueError(f"the text or the test is not there exactly once: {line}")
        rows.append((f"{name}.py", old, new, f"tests/test_{path}.py::{tests[0]}"))
    return rows


def list_files() -> list[str]:
    """Return the files of the project, those that git does not know yet, too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [file for file in listed.splitlines() if (ROOT / file).is_file()]


def break_and_test(name: str, old: str, new: str, test: str) -> None:
    """Run a test in a copy of the project with one mutation; end with DIFFERS + its exit code."""
    import pytest

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "shared").symlink_to(ROOT.parent / "shared")
        copy = Path(folder, "copy")
        for file in list_files():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        path = copy / name
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        os.chdir(copy)
        sys.path.remove(str(ROOT / "tests"))
        code = DIFFERS + pytest.main(["-x", "-q", "-p", "no:cacheprovider", test])
        os.chdir(ROOT)
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutations with this word")
    parser.add_argument("--workers", type=int, default=1, help="mutations at a time")
    asked, context = parser.parse_args(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)  # once, not for each mutation
    os.environ["OMP_NUM_THREADS"] = "1"

    def do(mutation: tuple[str, ...]) -> bool:
        child = context.Process(target=break_and_test, args=mutation)
        child.start()
        child.join(600)
        child.kill()
        caught = child.exitcode == DIFFERS + 1
        told = "caught" if caught else f"MISSED ({child.exitcode})"
        print(told, *map(repr, mutation), flush=True)
        return caught

    chosen = [mutation for mutation in read_mutations() if asked.only in " ".join(mutation)]
    with ThreadPoolExecutor(asked.workers) as pool:
        caught = list(pool.map(do, chosen))
    print(f"{sum(caught)} of {len(caught)} mutations are caught")
    sys.exit(not all(caught))


if __name__ == "__main__":
    main()
