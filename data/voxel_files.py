"""`StoredVoxels`: voxels that still lie in their file, raw or compressed; read in parts, verified.

Whatever the format, a header only says where its voxels begin, what they are and how many. Reading
them is here, for all formats alike: the length must agree, a compressed stream's own checksum too.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from isal import igzip, igzip_lib, isal_zlib

from data.files import InputError

BEST_RATIO = 1032  # no deflate stream is smaller than this fraction of its content
CHUNK = 2**20
# isal's types call its errors instances, not classes
DAMAGE: Any = (OSError, EOFError, ValueError, zlib.error, isal_zlib.error, igzip_lib.error)
Stream = io.RawIOBase | io.BufferedIOBase
Found = TypeVar("Found")
AGAIN = "the file is cut off or damaged, download or convert it again"


@dataclass(frozen=True, eq=False)
class StoredVoxels:
    """Voxels of `shape` (X, Y, Z), x fastest, in `file`, which must not change until they are read.

    Raises InputError, when it is made, where the file cannot hold what the header announces.
    """

    name: str  # for messages: the header's path
    file: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    codec: Literal["raw", "gzip", "zlib"] = "raw"
    start: int = 0  # byte of the file at which the stream begins
    stop: int | None = None  # byte behind it; None: the end of the file
    offset: int = 0  # byte of the (decompressed) stream at which the voxels begin
    slope: float = 1.0  # value = stored number × slope + inter
    inter: float = 0.0
    stamp: tuple[int, int] = field(init=False)  # size and time of change, as the header was read

    is_proxy = True  # for nibabel

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise InputError(
                f"{self.name}: header without voxels, {self.file.name} is missing; get both"
            )
        object.__setattr__(self, "stamp", _stamp(self.file))
        size = self.stamp[0]
        held = min(size if self.stop is None else self.stop, size) - self.start
        room = held * (1 if self.codec == "raw" else BEST_RATIO)
        if min(self.start, self.offset) < 0 or self.offset + self.nbytes > room:
            raise InputError(
                f"{self.name}: its voxels cannot be read (its header announces {self.nbytes} "
                f"bytes, more than {self.file.name} can hold); {AGAIN}"
            )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one slice of the last axis."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.plane_bytes * self.shape[2]

    @contextlib.contextmanager
    def open(self, scaled: bool = True) -> Iterator[Callable[[int, int], np.ndarray]]:
        """Yield `read(first, last)` → values (X, Y, first:last), the file read once as long as
        `first` ascends: float32 where the header rescales them, unless not `scaled`.

        Raises InputError where the file is gone, was changed since its header was read, is cut off,
        fails its checksum, goes on behind the last voxel, or holds what is no number.
        """
        with contextlib.ExitStack() as stack, np.errstate(over="ignore", invalid="ignore"):
            stream = self._guard(lambda: self._open_stream(stack))
            slope, inter = np.float32(self.slope), np.float32(self.inter)

            def read(first: int, last: int) -> np.ndarray:
                array = self._guard(lambda: self._read(stream, first, last))
                if scaled and (slope, inter) != (1, 0):
                    array = array.astype(np.float32) * slope
                    array += inter
                return make_native(array, self.name, first) if scaled else array

            yield read

    def _guard(self, work: Callable[[], Found]) -> Found:
        try:
            return work()
        except InputError:
            raise
        except DAMAGE as error:
            raise InputError(
                f"{self.name}: its voxels cannot be read ({error}); {AGAIN}"
            ) from error

    def _open_stream(self, stack: contextlib.ExitStack) -> Stream:
        if _stamp(self.file) != self.stamp:
            raise InputError(
                f"{self.name}: {self.file.name} was changed while it was read; start again once "
                "nobody writes it"
            )
        file = stack.enter_context(self.file.open("rb", buffering=0))
        if self.codec == "raw":
            return file
        file.seek(self.start)
        if self.codec == "gzip":  # by isal: 3 times as fast as zlib
            return stack.enter_context(igzip.IGzipFile(fileobj=file, mode="rb"))
        return _ZlibStream(file, None if self.stop is None else self.stop - self.start)

    def _read(self, stream: Stream, first: int, last: int) -> np.ndarray:
        begin = self.offset + (self.start if self.codec == "raw" else 0)
        stream.seek(begin + first * self.plane_bytes)
        raw = self._read_bytes(stream, (last - first) * self.plane_bytes)
        if (found := len(raw)) < (last - first) * self.plane_bytes:
            missing = (self.shape[2] - first) * self.plane_bytes - found
            raise EOFError(f"{missing} of {self.nbytes} bytes are missing")
        if last == self.shape[2]:
            self._refuse_rest(stream)
        return raw.view(self.dtype).reshape((*self.shape[:2], last - first), order="F")

    def _read_bytes(self, stream: Stream, count: int) -> np.ndarray:
        """The next `count` bytes, or as many as there are; a part may be read-only."""
        if self.codec == "gzip" and count < self.nbytes:
            with contextlib.suppress(MemoryError):  # `allocate` tells
                return np.frombuffer(stream.read(count), np.uint8)
        raw, done = allocate((count,), np.uint8, self.name), 0
        view = raw.data
        while done < count and (more := stream.readinto(view[done : done + CHUNK])):
            done += more
        return raw[:done]

    def _refuse_rest(self, stream: Stream) -> None:
        """Read on behind the last voxel: only zeros may follow, and then the checksum."""
        while rest := stream.read(CHUNK):
            if rest.strip(b"\0"):
                raise ValueError(
                    f"the file goes on behind the {self.nbytes} bytes that its header announces"
                )


def make_native(array: np.ndarray, name: str, first: int = 0) -> np.ndarray:
    """Voxels in this machine's byte order; `first`: the slice at which they begin.

    Raises InputError of kind "nan" for what is no number: nobody is ever given one.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise InputError(
            f"{name}: {np.count_nonzero(~finite)} voxels are NaN or infinite in the stored slices "
            f"{first + 1} to {first + array.shape[2]}; every voxel needs a number, convert "
            "it again",
            kind="nan",
        )
    return array


def allocate(shape: tuple[int, ...], dtype: Any, name: str) -> np.ndarray:
    """An array without content, first axis fastest. Raises InputError where memory is short."""
    try:
        return np.empty(shape, dtype, order="F")
    except (MemoryError, ValueError) as error:  # ValueError: more than any machine has
        raise InputError(
            f"{name}: its voxels {shape} do not fit into the memory; free some, or crop or "
            "resample the volume first"
        ) from error


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file}: no such file any more ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


class _ZlibStream(io.RawIOBase):
    """A zlib (or gzip) stream of `length` bytes of a file; reads forwards, seeks backwards anew."""

    def __init__(self, file: io.RawIOBase, length: int | None):
        self.file, self.start, self.length = file, file.tell(), length
        self._rewind()

    def _rewind(self) -> None:
        self.file.seek(self.start)
        self.left = self.length if self.length is not None else 2**63
        self.inflate, self.position = zlib.decompressobj(47), 0  # 47: the stream says which

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, target: int, whence: int = 0) -> int:
        if target < self.position:
            self._rewind()
        while self.position < target and self.read(min(CHUNK, target - self.position)):
            pass
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted, part = len(buffer), b""
        while not part and not self.inflate.eof:
            given = self.inflate.unconsumed_tail or self.file.read(min(CHUNK, self.left))
            if not self.inflate.unconsumed_tail:
                self.left -= len(given)
            part = self.inflate.decompress(given, wanted)
            if not given and not part:
                raise EOFError("the compressed stream ends early")
        if not part and (self.inflate.unused_data or (self.length and self.left)):
            raise ValueError("the compressed stream is shorter than its header announces")
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


class SummedFile(io.BufferedWriter):
    """A new file that is written from front to back, and the CRC-32 of what went into it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.crc32 = 0

    def write(self, data: Any) -> int:
        self.crc32 = isal_zlib.crc32(data, self.crc32)
        return super().write(data)
