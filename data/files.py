"""Files whole or not there, one process per folder, JSON and CSV; and the error of all rooms."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import socket
import time
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

SIGNATURE = "crc32"  # key of a record's checksum


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, why, and what to do.

    `kind` names the finding of the check that this is, see `data.check`.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


def find_checkpoint(path: Path, names: Sequence[str] = ("best.pt", "last.pt")) -> Path:
    """The checkpoint that a path stands for: itself, or of a run's folder the first of `names`."""
    files = [path / name for name in names] if path.is_dir() else [path]
    if found := [file for file in files if file.is_file()]:
        return found[0]
    raise InputError(f"{files[0]}: no such checkpoint; train one first, or check --checkpoint")


def read_json(path: Path, what: str = "a JSON object") -> Any:
    """Content of a JSON file, with or without a byte order mark; InputError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be {what}, got {error}; correct it or remove it") from error


def write_json(content: Any, path: Path) -> None:
    """Write JSON whole or not at all; a Path is written as its text."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def write_signed(record: dict[str, Any], path: Path) -> None:
    """`write_json` of an object with a checksum of its content, by which damage is known."""
    plain = json.loads(json.dumps(record, default=str))
    write_json(plain | {SIGNATURE: _sign(plain)}, path)


def read_signed(path: Path) -> dict[str, Any]:
    """What `write_signed` wrote, without its checksum; InputError where that does not agree."""
    record = read_json(path, "a record of this program")
    if not isinstance(record, dict) or record.pop(SIGNATURE, None) != _sign(record):
        raise InputError(f"{path}: is no record of this program and version, or was changed")
    return record


def _sign(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with these columns, separated by commas, semicolons or tabs (Excel)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    if not rows or not set(columns) <= set(rows[0]):
        raise InputError(f"{path}: must have the columns {','.join(columns)}, got {first!r}")
    return rows


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV, whole or not at all; a column for every key that any row has."""
    with (
        atomic_write(path) as temporary,  # names of files need be no UTF-8
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when all went well.

    The temporary name starts with a dot, has the process id and a mark, and keeps the suffixes,
    because writers choose the format by suffix. Whatever a writer raises on a full disk (torch,
    matplotlib and ITK do not raise OSError) becomes an InputError, as does a file that is not
    there or is empty afterwards. What was written is on the disk before it gets its name.
    """
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
        raise InputError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); "
            "choose a folder that exists, is writable and has free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a folder for this process, so that no second one writes into it.

    A lock whose owner has died on this machine is taken over. A folder that was made for it goes
    again where nothing came to stand in it. Raises InputError that names process and machine of the
    owner.
    """
    process, path, new = psutil.Process(), folder / ".lock", not folder.exists()
    mine = {"pid": process.pid, "started": process.create_time(), "host": socket.gethostname()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_lock(mine, path)
    except FileExistsError as error:
        if not folder.is_dir():
            raise InputError(f"{folder}: cannot be written (a file); choose a folder") from error
        owner = _read_lock(path)
        if _is_alive(owner, mine["host"]):
            raise InputError(
                f"{folder}: process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"
                f" writes here; wait for it or choose another folder (if it is gone: remove {path})"
            ) from None
        write_json(mine, path)
        time.sleep(0.1)  # another process may take it over at the same moment: the last one has it
        if _read_lock(path) != mine:
            raise InputError(f"{folder}: another process began to write here; wait") from None
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another"
        ) from error
    try:
        yield
    finally:
        if _read_lock(path) == mine:
            path.unlink(missing_ok=True)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_lock(mine: dict[str, Any], path: Path) -> None:
    """Write a lock that is not there yet; on a full disk none is left that nobody owns."""
    with path.open("x") as stream:
        try:
            json.dump(mine, stream)
            stream.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _read_lock(path: Path) -> dict[str, Any]:
    """Owner of a lock; of one that is only just being written, a living one for some seconds."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < 10:
                return {"host": "another machine", "pid": "unknown"}
        return {}


def is_running(pid: int) -> bool:
    """Whether a process of this machine lives; one that ended and that nobody has asked yet how
    (a zombie) does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # of another user: it is there
        return True


def _is_alive(owner: dict[str, Any], host: str) -> bool:
    """Whether the owner of a lock runs; on another machine nobody knows, so it does."""
    if owner.get("host") != host:
        return bool(owner)
    try:
        pid = int(owner["pid"])
        return is_running(pid) and abs(psutil.Process(pid).create_time() - owner["started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


LONGEST = 100  # letters of a case name; file systems allow 255 bytes with what is added


def show_path(path: Path) -> str:
    """A path that can be printed, also where its name is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------
# Case names
# ---------------------------------------------------------------------------------------


def make_safe(text: str) -> str:
    """A case name that every file system and spreadsheet takes as a name, and nothing else."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", text).strip().lstrip(".=+-@ ").rstrip(". ")
    text = re.sub(r"\.{2,}", ".", text)
    if len(text.encode()) > LONGEST:
        mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = text.encode()[: LONGEST - 9].decode("utf-8", "ignore") + "_" + mark
    return text or "case"


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorting key: liver_2 before liver_10."""
    return [(t.isdecimal(), int(t) if t.isdecimal() else 0, t) for t in re.split(r"(\d+)", name)]


# ---------------------------------------------------------------------------------------
# Lists of files
# ---------------------------------------------------------------------------------------


def list_plain_files(folder: Path) -> list[Path]:
    """What is not hidden in a folder, nor a folder, in the order of the names.

    Links that lead nowhere too, so that whoever reads them names them.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and not _is_folder(e)]
    return [folder / name for name in sorted(names)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_below(folder: Path, exclude: Path | None = None) -> list[Path]:
    """All files, also through links, each folder listed once; hidden ones (macOS leaves
    `._x.nii`) and `exclude` are not."""

    def refuse(error: OSError) -> None:  # what cannot be listed must not be missing silently
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); ask its owner")

    files: list[Path] = []
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            subfolders.clear()
            continue
        seen.add(real)
        kept = (n for n in sorted(subfolders) if not n.startswith("."))
        subfolders[:] = [n for n in kept if Path(place, n) != exclude]
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return files


def stamp_files(files: Iterable[Path]) -> list[list[Any]]:
    """Return [name, size in bytes, time of change in ns] of each file, for JSON."""
    try:
        return [[str(f), (found := f.stat()).st_size, found.st_mtime_ns] for f in files]
    except OSError as error:
        raise InputError(
            f"{show_path(Path(error.filename))}: cannot be read ({error.strerror}); check the path"
        ) from error


def read_record(path: Path, mark: str | None = None) -> dict[str, Any] | None:
    """Return the JSON object at `path` whose "mark" is `mark`; None: any mark.

    Return None where there is no such file, it is damaged, or its mark differs.
    """
    try:
        content = read_json(path)
    except InputError:
        return None
    if not isinstance(content, dict) or not content.keys() & {"mark", "fingerprint"}:
        return None
    return content if mark in (None, content.get("mark")) else None
