"""A name in a header reaches no file that is written, and no script opens a connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from attempts import SECRET, SOUND, Attempt, Config, build_demo

from data import volumes


def attack_identifiers(work: Path, config: Config) -> Iterator[Attempt]:
    """A name planted in every text of a header is in no file that is written from it."""
    array = np.ones((12, 11, 10), np.int16)
    folder = work / "identifiers"
    folder.mkdir()
    for key in ("descrip", "aux_file", "intent_name", "db_name", "data_type", "extension"):
        image = nib.Nifti1Image(array, np.diag([2, 2, 2, 1]))
        if key == "extension":
            extension = nib.nifti1.Nifti1Extension("comment", SECRET.encode())
            image.header.extensions.append(extension)
        else:
            image.header[key] = SECRET.encode()
        nib.save(image, folder / "in.nii")
        scan = volumes.read_file(folder / "in.nii")
        for name, volume in (("like", scan.like(array)), ("ras", scan.ras), ("same", scan)):
            volume.write(folder / "out.nii")
            leaked = SECRET.encode() in (folder / "out.nii").read_bytes()
            yield Attempt(f"identifier: {key}", "identifier" if leaked else SOUND, name)


def attack_sockets(work: Path, config: Config) -> Iterator[Attempt]:
    """From phantoms to a label map, each script watched."""
    for outcome, detail in build_demo(config)[1]:
        yield Attempt(f"sockets: {detail.split()[0]}", outcome, detail)
