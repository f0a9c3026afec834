"""A network as a MONAI bundle: its configuration, in MONAI's own transforms; no network here.

MONAI's bundle runner, MONAI Label and 3D Slicer's modules read it and need nothing of this project.
https://docs.monai.io/en/stable/mb_specification.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.files import write_json
from data.labels import IMAGE, PRED, Labels, group_tumours

TASK = "Segmentation of the liver in CT"
SCAN = "scan"  # key of the image as it was read
ANYTHING = "$lambda x: x > 1e-6"  # but air: resampling leaves less of it than that
BY_MAXIMUM = "$lambda s: torch.clamp(s, min=0) / torch.clamp(s.amax((1, 2), True), min=1e-6)"


def write_configuration(
    folder: Path, preprocessing: Mapping[str, Any], inference: Mapping[str, Any], modality: str
) -> None:
    """Write configs/inference.json and configs/metadata.json of a bundle.

    Args:
        preprocessing, inference: as a checkpoint has them: the settings of `Chain`, and window and
            overlap.
    """
    names = list(preprocessing["labels"])
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    configuration = describe_inference(preprocessing, inference)
    write_json(configuration, folder / "configs" / "inference.json")
    metadata = describe_network(names, inference["window"], modality)
    write_json(metadata, folder / "configs" / "metadata.json")


def describe_inference(
    preprocessing: Mapping[str, Any], inference: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of inference.json: from files in `datalist` to label maps in `output_dir`."""
    infer = "$torch.no_grad()(lambda image: @inferer(image[None].to(@device), @network)[0].cpu())"
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location='cpu')",
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": compose(list_steps(preprocessing)),
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(inference["window"]),
            "sw_batch_size": 1,
            "overlap": inference["overlap"],
            "mode": "gaussian",
        },
        "postprocessing": compose(list_steps_back(preprocessing)),
        "save": {
            "_target_": "SaveImaged",
            "keys": PRED,
            "output_dir": "@output_dir",
            "output_postfix": "label",
            "output_dtype": "$torch.uint8",
            "resample": False,
        },
        "infer": infer,
        "predict": f"$lambda item: @postprocessing(item | {{'{PRED}': @infer(item['{IMAGE}'])}})",
        "segment": f"$lambda path: @predict(@preprocessing({{'{IMAGE}': path}}))",
        "run": ["$[@save(@segment(path)) for path in @datalist]"],
    }


def compose(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """MONAI's Compose of some steps."""
    return {"_target_": "Compose", "transforms": list(steps)}


def list_steps(preprocessing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From a file to the network's grid: what `preprocess.py` does, in three dimensions at once."""
    patches, of_image = preprocessing["sampling"] == "patches", {"keys": IMAGE}
    x, y, *z = preprocessing["spacing"]
    resampled = {"_target_": "Spacingd", **of_image, "mode": "bilinear", "padding_mode": "border"}
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", **of_image, "ensure_channel_first": True},
        {"_target_": "CopyItemsd", **of_image, "names": SCAN},  # its grid, to come back to
        {"_target_": "Orientationd", **of_image, "axcodes": "RAS", "labels": None},
        {**resampled, "pixdim": [x, y, -1.0]},  # −1: the slices stay where they are
    ]
    if preprocessing["hu_window"]:
        low, high = preprocessing["hu_window"]
        scaled = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
        steps.append({"_target_": "ScaleIntensityRanged", **of_image, **scaled})
    else:  # each slice by its maximum
        steps.append({"_target_": "Lambdad", **of_image, "func": BY_MAXIMUM})
    if patches:  # windows slide over what is not air
        steps.append({**resampled, "pixdim": [-1.0, -1.0, *z]})  # of what the HU window left
        cropped = {"source_key": IMAGE, "allow_smaller": True, "select_fn": ANYTHING}
        steps.append({"_target_": "CropForegroundd", **of_image, **cropped})
    else:
        size = [*preprocessing["input_size"], -1]
        resized = {"spatial_size": size, "mode": "trilinear"}
        steps.append({"_target_": "Resized", **of_image, **resized})
    return steps


def list_steps_back(preprocessing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the network's scores to raw label values on the scan's grid, cleaned."""
    labels: Labels = preprocessing["labels"]
    names, of_result = list(labels)[1:], {"keys": PRED}
    patches = preprocessing["sampling"] == "patches"
    # One interpolation straight to the scan's grid, as ours; Invertd would do several. Outside of
    # the windows all scores are 0, of which argmax takes the background.
    grid = {"key_dst": SCAN, "mode": "bilinear", "padding_mode": "zeros" if patches else "border"}
    steps: list[dict[str, Any]] = [
        {"_target_": "ResampleToMatchd", **of_result, **grid},
        {"_target_": "AsDiscreted", **of_result, "argmax": True},
    ]
    for organ, tumours in group_tumours(names).items():
        body = {"applied_labels": [organ, *tumours], "independent": False}
        steps.append({"_target_": "KeepLargestConnectedComponentd", **of_result, **body})
        steps.append({"_target_": "FillHolesd", **of_result, "applied_labels": [organ]})
    values = [raw[0] for raw in labels.values()]
    if values != list(range(len(values))):
        mapped = {"orig_labels": list(range(len(values))), "target_labels": values}
        steps.append({"_target_": "MapLabelValued", **of_result, **mapped})
    return steps


def describe_network(names: Sequence[str], window: Sequence[int], modality: str) -> dict[str, Any]:
    """The content of metadata.json: what goes into the network and what comes out."""
    shared = {"spatial_shape": list(window), "dtype": "float32", "is_patch_data": True}
    channels = dict(enumerate(names))
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/"
        "0.8.1/meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel")},
        "task": TASK,
        "description": f"{', '.join(names[1:])} in {modality}; a research tool, no medical device",
        "authors": "",
        "copyright": "",
        "network_data_format": {
            "inputs": {
                IMAGE: {
                    "type": "image", "format": "hounsfield" if modality == "CT" else "magnitude",
                    "modality": modality, "num_channels": 1, "value_range": [0, 1],
                    "channel_def": {"0": "image"}, **shared,
                }
            },
            "outputs": {
                PRED: {
                    "type": "image", "format": "segmentation", "num_channels": len(names),
                    "value_range": [], "channel_def": channels, **shared,
                }
            },
        },
    }  # fmt: skip
