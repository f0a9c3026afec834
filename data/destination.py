"""A folder of prepared cases: whole or not there; nothing is removed that was not written here."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.files import InputError, is_running, read_json, read_signed, write_json

OURS = re.compile(r"case\.json|(image|label)_\d{4,}\.nii(\.gz)?")  # files of a case's folder
PARTIAL = re.compile(r"\.(\d+)\.partial\..+")  # unfinished, of the process of this number


class DestinationError(InputError):
    """The destination cannot be written: it ends the run and says nothing about a scan."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here failed in writing."""
    try:
        yield
    except DestinationError:
        raise
    except (OSError, InputError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DestinationError(
            f"{path}: cannot be written ({reason or error}); choose a folder that is writable and "
            "has free space, then run the same command again: finished cases are kept"
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """A record that an earlier run kept; empty where there is none that can be used."""
    try:
        content = read_signed(path)
    except InputError:
        return {}
    return content if "fingerprint" in content else {}


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it takes that name once it is complete."""
    temporary = folder.with_name(f".{os.getpid()}.partial.{folder.name}")
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(folder):
            if folder.is_dir():
                remove_case(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_case(folder: Path) -> None:
    """Remove the folder of a case that an earlier run wrote; refuses anybody else's."""
    foreign = [path.name for path in sorted(folder.iterdir()) if not OURS.fullmatch(path.name)]
    if foreign or not (folder / "case.json").is_file():
        raise DestinationError(
            f"{folder}: holds {foreign[0] if foreign else 'no case.json'}, so prepare.py did not "
            "write it; move it away"
        )
    shutil.rmtree(folder)


def remove_leftovers(destination: Path) -> None:
    """Remove what processes that were killed left unfinished."""
    for folder in (destination, destination / "check", destination / "subvolumes"):
        for path in folder.glob(".*.partial.*"):
            name = PARTIAL.fullmatch(path.name)
            if not name or is_running(int(name[1])):
                continue
            if path.is_file():
                path.unlink()
            elif all(
                PARTIAL.sub("", f.name) == "" or OURS.fullmatch(f.name) for f in path.iterdir()
            ):
                shutil.rmtree(path)


def remove_orphans(destination: Path, names: set[str]) -> None:
    """Remove sub-volumes and pictures of cases that the source does not hold any more."""
    for folder in sorted((destination / "subvolumes").glob("*/case.json")):
        if folder.parent.name not in names and read_record(folder):
            with contextlib.suppress(DestinationError):
                remove_case(folder.parent)
    for record in sorted((destination / "check").glob("*.json")):
        if record.stem not in names and read_record(record):
            record.with_suffix(".png").unlink(missing_ok=True)
            record.unlink()


def claim_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Keep one source per destination; `overwrite` removes what was prepared from another one."""
    mark = destination / "check" / ".source.json"
    asked = str(source.resolve())
    known = read_mark(mark) or read_mark(destination / "dataset.json")
    if known and known != asked:
        if not overwrite:
            raise InputError(
                f"{destination}: was prepared from {known}, not from {asked}; choose another "
                "--destination, or give --overwrite to replace it"
            )
        (destination / "dataset.json").unlink(missing_ok=True)
        remove_orphans(destination, set())
    if known != asked or not mark.is_file():
        with writing(mark):
            write_json({"source": asked}, mark)


def read_mark(path: Path) -> str:
    """The source that a destination was prepared from; empty where that is not known."""
    try:
        return str(read_json(path)["source"])
    except (InputError, KeyError, TypeError):
        return ""
