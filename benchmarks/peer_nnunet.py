"""nnU-Net v2 on one round of `benchmarks/peers.py`, which runs this in nnU-Net's own environment.

    .venv-peers/bin/python benchmarks/peer_nnunet.py prepare|train|predict JOB.json

All is nnU-Net's own: plans, preprocessing, network, patches, augmentation, loss, optimizer and
sliding windows. Only its schedule is another: 1000 epochs of 250 iterations are days on one thread,
so its polynomial learning rate falls over the CPU minutes of this process, and no validation takes
minutes from the training. The planner is told of a small memory, its own option, so that a patch is
small enough for some dozens of iterations.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

TILE_STEP = 0.5  # nnU-Net's usual one
PLAN = ("spacing", "patch_size", "batch_size", "median_image_size_in_voxels")


class ShortTrainer(nnUNetTrainer):
    """nnU-Net's trainer, for some CPU minutes of this process."""

    def run_training(self, minutes: float) -> list[float]:
        """Train until they are used; the loss of each iteration."""
        self.on_train_start()
        self.network.train()
        losses: list[float] = []
        while (used := time.process_time() / 60 / minutes) < 1:
            self.lr_scheduler.step(used * self.num_epochs)
            losses.append(float(self.train_step(next(self.dataloader_train))["loss"]))
            if len(losses) % 5 == 0:
                print(f"{len(losses)} iterations, {used:.0%}, loss {losses[-1]:.3f}", flush=True)
        self.save_checkpoint(self.name_checkpoint())
        return losses

    def name_checkpoint(self) -> str:
        """Where the last weights are."""
        return f"{self.output_folder}/checkpoint_final.pth"


def read_plans(job: dict) -> dict:
    """What nnU-Net planned for the round."""
    folder = Path(job["folder"]).parent / "preprocessed" / Path(job["data"]).name
    return json.loads((folder / "nnUNetPlans.json").read_text())


def make_trainer(job: dict) -> ShortTrainer:
    """Of all training patients of the round, nothing kept back."""
    plans = read_plans(job) | {"continue_training": False}
    about = json.loads((Path(job["data"]) / "dataset.json").read_text())
    return ShortTrainer(plans, job["configuration"], "all", about, torch.device("cpu"))


def prepare(job: dict) -> None:
    """Fingerprint, plans and preprocessed data; the plan's main numbers, or None of no plan."""
    number = int(Path(job["data"]).name[7:10])
    extract_fingerprints([number], num_processes=1, show_progress_bar=False)
    plan_experiments([number], gpu_memory_target_in_gb=job["memory_gb"])
    plan = read_plans(job)["configurations"].get(job["configuration"])
    if plan is not None:
        preprocess([number], configurations=[job["configuration"]], num_processes=[1])
        plan = {key: plan[key] for key in PLAN}
    (Path(job["folder"]) / "plan.json").write_text(json.dumps(plan))


def train(job: dict) -> None:
    """Until the minutes are used; writes the weights, then how many iterations they took."""
    np.random.seed(job["seed"])  # noqa: NPY002 - nnU-Net draws its patches from it
    torch.manual_seed(job["seed"])
    losses = make_trainer(job).run_training(job["minutes"])
    record = {"iterations": len(losses), "last_losses_mean": round(np.mean(losses[-10:]).item(), 4)}
    (Path(job["folder"]) / "training.json").write_text(json.dumps(record))


def predict(job: dict) -> None:
    """A label map of each held-out scan on its own grid: 1 is liver."""
    trainer = make_trainer(job)
    trainer.load_checkpoint(trainer.name_checkpoint())
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(
        TILE_STEP, use_mirroring=False, perform_everything_on_device=False, device=trainer.device,
        allow_tqdm=False,
    )  # fmt: skip
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager,
        [trainer.network.state_dict()], trainer.dataset_json, type(trainer).__name__, None,
    )  # fmt: skip
    for name, scan in job["held_out"].items():
        predictor.predict_from_files_sequential([[scan]], [f"{job['folder']}/{name}"])


if __name__ == "__main__":
    {"prepare": prepare, "train": train, "predict": predict}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text())
    )
