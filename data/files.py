"""Atomic writes, locks, records, JSON, CSV, names and lists of files; the error of all modules."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import traceback
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock


class InputError(ValueError):
    """An input that cannot be used: file, found, expected, remedy. `kind`: one of `data.check`."""

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


def explain(error: Exception, place: str = "") -> str:
    """Return an error in one line, an unforeseen one with its place; LIVER_DEBUG=1 traces it."""
    if isinstance(error, InputError):
        return str(error)
    if os.environ.get("LIVER_DEBUG"):
        traceback.print_exception(error)
    return f"{place}{type(error).__name__}: {error}".splitlines()[0]


def find_checkpoint(path: Path, names: Sequence[str] = ("best.pt", "last.pt")) -> Path:
    """Return the checkpoint `path`, or the first of `names` in a run's folder."""
    files = [path / name for name in names] if path.is_dir() else [path]
    if found := [file for file in files if file.is_file()]:
        return found[0]
    remedy = "check --checkpoint, train one first, or give checkpoints/starter.pt"
    raise InputError(f"{files[0]}: no such checkpoint; {remedy}")


def read_json(path: Path, what: str = "a JSON object") -> Any:
    """Return the content of a JSON file, with or without a byte order mark."""
    try:
        return json.loads(_read_text(path), object_pairs_hook=_refuse_twice)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be {what}, got {error}; correct it or remove it") from error


def _read_text(path: Path) -> str:
    """Return a file's text without byte order mark; OSError for a pipe, which would never end."""
    if path.exists() and not path.is_file():
        raise OSError("it is no plain file")
    return path.read_text(encoding="utf-8-sig")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object; ValueError where a name comes twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} twice")
    return entries


def write_json(content: Any, path: Path) -> None:
    """Write JSON whole or not at all, a Path as its text."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file with these columns; commas, semicolons or tabs part them."""
    try:
        text = _read_text(path)
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from error
    if not rows or not set(columns) <= set(rows[0]):
        raise InputError(f"{path}: must have the columns {','.join(columns)}, got {first!r}")
    return rows


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV, whole or not at all, with a column for each key of any row."""
    with (
        atomic_write(path) as temporary,  # names of files need be no UTF-8
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


DAMAGED = "the file is cut off or damaged, copy or export it again, or convert it to .nii.gz"
REMEDIES = {  # of errors that say nothing about the file
    MemoryError: "the memory is too small, free some or crop the volume",
    PermissionError: "ask its owner",
}


@contextlib.contextmanager
def one_error(path: Path, what: str, remedy: str = DAMAGED) -> Iterator[None]:
    """Turn whatever a library raises into an InputError that names `path`; hide its warnings."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of values that this program checks
            yield
    except InputError:
        raise
    except Exception as error:  # damaged bytes lead a library to anything
        remedy = next((r for kind, r in REMEDIES.items() if isinstance(error, kind)), remedy)
        raise InputError(f"{path}: {what} ({explain(error)}); {remedy}") from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes the final name only when all went well. It
    keeps the suffixes, because writers choose the format by them. Whatever a writer raises on a
    full disk (torch and matplotlib raise no OSError) becomes an InputError, as does a missing or
    empty file. The content is on the disk before it gets its name."""
    name = path.name if len(path.name) < 200 else f"{zlib.crc32(path.name.encode()):08x}"
    suffix = "" if name == path.name else "".join(path.suffixes)[-20:]
    temporary = path.with_name(f".{os.getpid()}.partial.{name}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            if not stream.seek(0, os.SEEK_END):
                raise OSError("nothing was written")
            os.fsync(stream.fileno())
        temporary.replace(path)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        what = f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); choose"
        raise InputError(f"{what} a folder that exists, is writable and has free space") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; InputError where another process has it. The operating system
    frees the lock of a process that dies. A folder made for the lock is removed if still empty."""
    path, new = folder / ".lock", not folder.exists()
    lock = filelock.FileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # a file system that knows no locks
        what = f"cannot be written or locked ({error});"
        if isinstance(error, filelock.Timeout):
            what = "another process writes here; wait for it or"
        raise InputError(f"{folder}: {what} choose another folder") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is free, so that nobody else holds the removed file
        lock.release()
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


LONGEST = 100  # bytes of a case name; file systems allow 255 with what is added


def show_path(path: Path) -> str:
    """Return a path as text that can be printed, also where its name is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def make_safe(text: str) -> str:
    """Return a case name that is a plain name to every file system and spreadsheet."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", text).strip().lstrip(".=+-@ ").rstrip(". ")
    text = re.sub(r"\.{2,}", ".", text)
    if len(text.encode()) > LONGEST:
        mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = text.encode()[: LONGEST - 9].decode("utf-8", "ignore") + "_" + mark
    return text or "case"


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sorting key that puts liver_2 before liver_10."""
    return [(t.isdecimal(), int(t) if t.isdecimal() else 0, t) for t in re.split(r"(\d+)", name)]


def list_plain_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are not hidden, by name; broken links too."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not _is_hidden(e.name) and not Path(e).is_dir()]
    return [folder / name for name in sorted(names)]


def _is_hidden(name: str) -> bool:
    """Return whether a name begins with one dot; `..a.nii` is a file as any other."""
    return name.startswith(".") and not name.startswith("..")


def list_below(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Return all files below a folder, also through links, but none hidden nor in `exclude`."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); ask its owner")

    files: list[Path] = []
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            subfolders.clear()
            continue
        seen.add(real)
        kept = (n for n in sorted(subfolders) if not _is_hidden(n))
        subfolders[:] = [n for n in kept if Path(place, n) != exclude]
        files += [Path(place, name) for name in sorted(names) if not _is_hidden(name)]
    return files


def stamp_files(files: Iterable[Path]) -> list[list[Any]]:
    """Return [name, size in bytes, time of change in ns] of each file, for JSON."""
    try:
        return [[str(f), (found := f.stat()).st_size, found.st_mtime_ns] for f in files]
    except OSError as error:
        what = f"{show_path(Path(error.filename))}: cannot be read ({error.strerror})"
        raise InputError(f"{what}; check the path") from error


def read_record(path: Path, mark: str | None = None) -> dict[str, Any] | None:
    """Return the JSON object at `path` whose "mark" is `mark`; None: any mark. Return None where
    there is no such file, it is damaged, or its mark differs."""
    try:
        content = read_json(path)
    except InputError:
        return None
    if not isinstance(content, dict) or "mark" not in content:
        return None
    return content if mark in (None, content.get("mark")) else None
