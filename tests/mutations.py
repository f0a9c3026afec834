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
preprocess | [[self.seed, self.epoch, i | [[self.seed, i | training::depends_on
preprocess | "nearest", "nearest-exact" | "nearest", "nearest" | geometry::chain_equals
preprocess | np.diag([x, y, 1.0]) | np.diag([y, x, 1.0]) | geometry::whatever_the_number
preprocess | [*spacing_mm[:2], 1.0] | [*spacing_mm[1::-1], 1.0] | geometry::whatever_the_number
preprocess | part.stop) + to_network[axis, 3] | part.stop) | geometry::landmark
preprocess | to_network[:2, 3] -= | to_network[:2, 3] -= 0 * | geometry::cropped_to_the_body
preprocess | item[INDICES][chosen] | item[INDICES][0] | recipes::rare_class
preprocess | ["subvolumes"] if record["split"] == split] | ["subvolumes"]] | training::begins_with
preprocess | half * unknown | 0 * unknown | ignored::between_two_slices
preprocess | torch.Generator(slices.device) | torch.Generator() | cuda::pretended_gpu
preprocess | stream.wait_event(used) | pass | cuda::pretended_gpu
preprocess | _stream(self.dataset.device).wait_event(made) | _stream() | cuda::pretended_gpu
preprocess | theta = move( | theta = (lambda tensor, _: tensor)( | cuda::pretended_gpu
preprocess | weights.to(slices) | weights | cuda::pretended_gpu
preprocess | step / 2 - 1) > 0 | step / 2 - 9) > 0 | geometry::takes_means
preprocess | max(spacing / slice_mm, 1) | 1 | geometry::takes_means
train | where(known.any(), | where(known.any().item() == known.any(), | cuda::pretended_gpu
utilities | return loss.detach(), torch | return loss.item(), torch | cuda::pretended_gpu
utilities | .parameters(), clip) | .parameters(), clip, 2.0, True) | cuda::pretended_gpu
utilities | = image.to(self.device, non_blocking=True, | = image.to("cpu", | cuda::pretended_gpu
utilities | (network, device).eval() | (network, device).eval().cpu() | cuda::pretended_gpu
preprocess | .to(device, non_blocking=on_gpu) | .to(device) | cuda::pretended_gpu
utilities | run.scheduler.step() | pass | run_memory::at_the_rate
utilities | group["lr"] = rate | pass | run_memory::at_the_rate
utilities | run.network.train() | pass | training::train_mode
utilities | run.kept.eval()\n    names | names | training::train_mode
utilities | nn.utils.clip_grad_norm_(run.model.parameters(), clip) | pass | ignored::clipped
utilities | torch.set_rng_state(resume["random"].cpu()) | pass | training::control_c
utilities | set_epoch(epoch, len(run.losses)) | set_epoch(epoch) | training::control_c
utilities | ("model", "optimizer", | ("model", | training::share_of_the_pretrained
utilities | v.lerp(old, share) | v.lerp(old, 1 - share) | training::share_of_the_pretrained
utilities | patients[case] += | patients[len(patients)] += | ignored::voxels_out
utilities | (logits).masked_fill(label | (logits).masked_fill(0 * label | ignored::voxels_out
utilities | .detach()).masked_fill(label | .detach()).masked_fill(0 * label | ignored::voxels_out
utilities | (self.history)[0] == epoch | (self.history)[0] | run_memory::at_the_rate
utilities | network_state=self.kept | network_state=self.model | training::share_of_the_pretrained
utilities | table[:, sum(patients.values())[2] == 0] = math.nan | pass | ignored::voxels_out
utilities | int(rank) >= int(size) | False | run_memory::impossible_processes
utilities | run.share_buffers() | pass | engine::two_processes
utilities | parallel(self.model) if dist.is_initialized() else self. | self. | engine::two_processes
utilities | elif not torch.isfinite(tensor).all(): | elif False: | run_memory::other_content
train | 0.5 * (1 + math.cos(math.pi * progress)) | 1.0 | run_memory::at_the_rate
train | n % c.grain | n % 8 | training::wrong_settings
train | include_background=False | include_background=True | network::by_hand
train | alpha=0.3, beta=0.7 | alpha=0.7, beta=0.3 | network::by_hand
train | weight=weights, lambda_dice=0.0 | lambda_dice=0.0 | network::cross_entropy
train | ** -0.5 | ** -1.0 | run_memory::nobody_judged
train | config.patches_per_case if patches | 1 if patches | training::begins_with
train | torch.manual_seed(config.seed) | torch.manual_seed(0) | training::begins_with
train | Subvolumes(cached, device | Subvolumes(cached, augment, device | training::begins_with
train | label != IGNORED, self.loss | label < 999, self.loss | ignored::loss_and_gradient
train | splits.refuse_other_data(saved | print(saved | run_memory::same_data_alone
train | splits.refuse_damaged(prepared, config.data, rank, size) | pass | run_memory::was_changed
train | saved["preprocessing"] != | {} == | run_memory::same_data_alone
train | (seen := splits.find | not (seen := splits.find | run_memory::bring_their_patients
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
data/splits | SPLITS[part == 0] for | SPLITS[part == 1] for | prepare::folds_divide
data/splits | f"{key}_{record['first_slice']:04d}." | key | run_memory::dataset_json_that
data/splits | places.setdefault(patient, here) != here | False | run_memory::dataset_json_that
data/evaluate | true == IGNORED | true == 254 | evaluation::ignored_voxels
data/evaluate | @ grid.ras_affine[:3, :3].T | * 1.0 | evaluation::agree_with_monai
data/evaluate | @ grid.ras_affine[:3 | @ grid.affine[:3 | evaluation::agree_with_monai
data/evaluate | row.get("weights", "") == weights] | True] | evaluation::of_one_network
data/evaluate | 1000 * sizes | 100 * sizes | evaluation::counted_one_by_one
data/evaluate | (ours - theirs) * grid | (theirs - ours) * grid | evaluation::agree_with_monai
data/scans | array.min() > DENSEST_AIR | False | cases::padding_of_one
data/trust | ) if case["split"] == "training"] | )] | trust::knows_the_volumes
data/volumes | np.linalg.det(self.affine[:3, :3]) | np.prod(self.spacing_mm) | evaluation::sheared
data/volumes | self.affine @ inv_ornt_aff( | self.affine + 0 * inv_ornt_aff( | volumes::all_48
data/volumes | TO_LPS = np.diag([-1.0 | TO_LPS = np.diag([1.0 | dicom_series::ordered_by_position
data/dicom | float(normal @ one.position)) | 0) | dicom_series::ordered_by_position
data/dicom | if apart and not own: | if False: | dicom_series::interleaved_scans
data/dicom | or ahead.max() > max(UNEVEN * spacing, | or -1 > max(0, | dicom_series::no_regular_grid
data/scans | % every != 0] = IGNORED | % every != 0] = 0 | prepare_edges::between_the_annotated
data/labels | {"liver": ("liver", "tumour")} | {"liver": ("liver",)} | labels::the_default_learns
data/labels | classes if declared == own | classes if True | apply_inputs::read_by_its_names
data/labels | if len(found) == 1 else None | if found else None | labels::one_label_or_none
data/check | * spacing_mm[0] > 10 | * spacing_mm[0] > 999 | prepare_check::organs_are_doubted
data/check | record["patient"] = one["patient"] | pass | prepare_check::under_two_names
prepare | if inside != covered: | if False: | prepare_edges::lost
apply_model | if where != "test" and not accepted: | if False: | run_memory::refused_by_its_voxels
apply_model | bool(config.accept) | True | run_memory::refused_by_its_voxels
apply_model | if seen and config.split != "training" and not | if not | run_memory::never_reported
apply_model | if options.largest_component and | if False and | evaluation::post_processing
apply_model | np.argmax(sizes * kept) | np.argmax(sizes[1:]) + 1 | evaluation::post_processing
apply_model | doubt.word = "look" | pass | bodies::is_not_called_good
data/check | axis=2).view(np.uint8)) | axis=2)) | evaluation::in_one_line
data/check | patient[2] > (rows | patient[2] < (rows | prepare_check::doubted_by_volume
apply_model | (10 * sizes >= sizes[most]) | True | evaluation::both_stay
apply_model | if most in end] | ] | evaluation::both_stay
apply_model | =26)\n        sizes | =6)\n        sizes | evaluation::post_processing
apply_model | (body.view(np.uint8) | (body | evaluation::in_one_line
apply_model | MUCH * kept * voxel_ml | MUCH * kept | evaluation::that_cleaning_changes
apply_model | (step, step, 1)).tolist() | (1, 1, 1)).tolist() | evaluation::implausible_livers
apply_model | min(parts, key=splits | max(parts, key=splits | run_memory::refused_by_its_voxels
apply_model | *model.others)) | *model.others[:0])) | apply_inputs::the_mean_of
apply_model | if options.fill_holes: | if False: | evaluation::post_processing
apply_model | (body if options.tumour_inside else part | (part | evaluation::post_processing
apply_model | likely.numpy() > SURE | likely.numpy() > 0.75 | evaluation::nowhere_sure
apply_model | if saved[key] != first[key]: | if False: | apply_inputs::are_not_averaged
apply_model | replace(scan.from_ras(raw) | replace(scan.like(raw) | geometry::every_orientation
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
