"""MONAI's 3D segmentation tutorial on one round of `benchmarks/peers.py`, which runs this.

    python benchmarks/peer_monai.py train|predict JOB.json

The network, the chain and the training that Project-MONAI/tutorials publishes for the spleen
(3d_segmentation/spleen_segmentation_3d), written anew from MONAI's functions. What differs: the
liver's HU window, padding where a scan is lower than a patch, one thread, and the last weights
after a fixed number of CPU minutes in place of the best of 600 epochs. Caching counts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism

HU_WINDOW = (-200, 250)  # of the liver; the spleen's was -57 to 164
SPACING_MM = (1.5, 1.5, 2.0)
PATCH, SEARCH = (96, 96, 96), (160, 160, 160)  # of training, of sliding windows
MODES = {"image": "bilinear", "label": "nearest"}


def make_chain(*keys: str) -> Compose:
    """From files to what the network sees, without chance."""
    low, high = HU_WINDOW
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
            CropForegroundd(keys, source_key="image"),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=SPACING_MM, mode=[MODES[key] for key in keys]),
        ]
    )


def make_network() -> UNet:
    """The tutorial's."""
    return UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2), num_res_units=2, norm="batch",
    )  # fmt: skip


def make_loader(cases: list[dict]) -> DataLoader:
    """Two cases a batch, four patches of each, around liver and beside it."""
    crop = RandCropByPosNegLabeld(
        ("image", "label"), label_key="label", spatial_size=PATCH, pos=1, neg=1, num_samples=4,
        image_key="image", image_threshold=0,
    )  # fmt: skip
    pad = SpatialPadd(("image", "label"), PATCH)
    chain = Compose([*make_chain("image", "label").transforms, pad, crop])
    data = CacheDataset(cases, chain, progress=False)
    return DataLoader(data, batch_size=2, shuffle=True, num_workers=0)


def train(job: dict) -> None:
    """Until the minutes are used; writes the weights, then how many iterations they took."""
    set_determinism(job["seed"])
    loader, network = make_loader(job["training"]), make_network()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    loss_function = DiceLoss(to_onehot_y=True, softmax=True)
    losses: list[float] = []
    while time.process_time() < job["minutes"] * 60:
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_function(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if time.process_time() >= job["minutes"] * 60:
                break
        print(f"{len(losses)} iterations, loss {losses[-1]:.3f}", flush=True)
    folder = Path(job["folder"])
    torch.save(network.state_dict(), folder / "last.pt")
    record = {"iterations": len(losses), "last_losses_mean": round(np.mean(losses[-10:]).item(), 4)}
    (folder / "training.json").write_text(json.dumps(record))


def predict(job: dict) -> None:
    """A label map of each held-out scan on its own grid: 1 is liver."""
    folder, network = Path(job["folder"]), make_network()
    network.load_state_dict(torch.load(folder / "last.pt", weights_only=True))
    network.eval()
    chain = make_chain("image")
    back = Invertd("pred", chain, orig_keys="image", nearest_interp=False)
    for name, scan in job["held_out"].items():
        sample = chain({"image": scan})
        with torch.inference_mode():
            scores = sliding_window_inference(sample["image"][None], SEARCH, 4, network)
        sample["pred"] = scores[0]
        classes = back(sample)["pred"].argmax(0).numpy().astype(np.uint8)
        nib.save(nib.Nifti1Image(classes, nib.load(scan).affine), folder / f"{name}.nii.gz")


if __name__ == "__main__":
    {"train": train, "predict": predict}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
