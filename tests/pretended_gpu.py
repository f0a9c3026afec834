"""A pretended GPU: tensors whose device is cuda:0, computed by the CPU's kernels in host memory.

Use it as a pytest plugin in a process of its own (a CPU build of torch is enough):

    python -m pytest -p pretended_gpu tests/test_cuda.py

torch's own dispatcher, autograd and device checks run: an operator that meets tensors of two
devices raises as on a GPU. `TRIPS` counts what crosses between host and device, by kind and line of
the project. Addresses inside torch's libraries are those of the pinned version, see `TORCH`.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import library
from torch.utils import _pytree as pytree

TORCH = "2.13."  # whose tables of functions `announce_device` writes to
CPU, GPU = 1, 2  # device types of DLPack
ROOT = Path(__file__).resolve().parent.parent
TRIPS: collections.Counter[tuple[str, str]] = collections.Counter()  # (kind, line) → times
STREAMS: collections.Counter[str] = collections.Counter()  # stream → operators
KEPT: list[Any] = []  # what torch's C++ holds pointers to

# Operators whose result the host waits for.
BLOCKING = {f"aten::{name}" for name in (
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2",
    "unique_dim",
)}  # fmt: skip
# Indices may lie in host memory, and copies are what crosses.
MAY_MIX = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::copy_"}
SLOW_IN_HALF = {"aten::convolution", "aten::convolution_backward"}  # on a CPU: done in float32

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def relabel(tensor: torch.Tensor, device: int) -> torch.Tensor:
    """Return the same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor.resolve_conj().resolve_neg())
    fields = (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + 8)
    fields[0], fields[1] = device, 0
    return torch._C._from_dlpack(capsule)


def is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def find_line() -> str:
    """Return the nearest line of the project that led here, `preprocess.py:371`."""
    frame: Any = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent.name != "tests" and ".venv" not in path.parts:
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "tests"


def run_on_cpu(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operator of CUDA tensors by the CPU's kernel; raise where devices are mixed."""
    name = operator._schema.name
    if name in BLOCKING:
        TRIPS["cuda→cpu", find_line()] += 1
    given, form = pytree.tree_flatten((args, kwargs))
    if (drawn := kwargs.get("generator")) is not None and HOMES.get(drawn._cdata) != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
    where = getattr(CURRENT, "stream", USUAL).name
    STREAMS[where] += 1
    devices = {
        t.device.type for t in given if isinstance(t, torch.Tensor) and (t.dim() or is_on_gpu(t))
    }
    if len(devices) > 1 and name not in MAY_MIX:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({name} at {find_line()})"
        )
    own: dict[int, torch.Tensor] = {}  # id of a host tensor → the CUDA tensor of its memory

    def lower(value: Any) -> Any:
        if is_on_gpu(value):
            host = relabel(value, CPU)
            if name == "aten::resize_" or not value.untyped_storage().nbytes():
                host = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(
                    host
                )  # borrowed memory cannot grow
            own[id(host)] = value
            return host
        is_device = isinstance(value, torch.device) and value.type == "cuda"
        return torch.device("cpu") if is_device else value

    def lift(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_on_gpu(value):
            return value
        return own[id(value)] if id(value) in own else relabel(value, GPU)

    lowered = [lower(value) for value in given]
    args, kwargs = pytree.tree_unflatten(lowered, form)
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = None
    half = name in SLOW_IN_HALF and args[0].dtype == torch.float16
    if half:
        args, kwargs = cast_all((args, kwargs), torch.float16, torch.float32)
    result = operator(*args, **kwargs)
    if half:
        result = cast_all(result, torch.float32, torch.float16)
    for host in lowered:  # what was written to (out=, resize_) may have moved
        if isinstance(host, torch.Tensor) and id(host) in own:
            device = own[id(host)]
            moved = host.numel() and host.data_ptr() != device.data_ptr()
            if moved or (host.shape, host.stride()) != (device.shape, device.stride()):
                device.data = relabel(host, GPU)
    return pytree.tree_map(lift, result)


def cast_all(values: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return pytree.tree_map(
        lambda v: v.to(new) if isinstance(v, torch.Tensor) and v.dtype == old else v, values
    )


# Copies and storages
def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    ends = source.device.type, target.device.type
    if ends[0] != ends[1]:
        TRIPS["→".join(ends) + " async" * non_blocking, find_line()] += 1
    host, read = (relabel(t, CPU) if is_on_gpu(t) else t for t in (target, source))
    host.copy_(read)
    return target


def set_(target: Any, source: Any, offset: int = 0, size: Any = None, stride: Any = ()) -> Any:
    """Do what torch.load asks for: a tensor of (a part of) a storage, copied."""
    if isinstance(source, torch.Tensor):
        target.data = source
        return target
    host, part = torch.empty(0, dtype=target.dtype), storage_to_host(source)
    host = host.set_(part) if size is None else host.set_(part, offset, size, stride)
    target.data = relabel(host, GPU)
    return target


def storage_to_host(storage: Any) -> Any:
    if storage.device.type == "cpu":
        return storage
    host = torch.UntypedStorage(storage.nbytes())
    ctypes.memmove(host.data_ptr(), storage.data_ptr(), storage.nbytes())
    return host


def storage_to(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
    host = storage_to_host(storage)
    if torch.device(device).type == "cpu":
        return host
    return relabel(torch.empty(0, dtype=torch.uint8).set_(host).clone(), GPU).untyped_storage()


# What torch asks its CUDA part
def announce_device() -> None:
    """Tell torch's C++ of one accelerator, named CUDA, whose guard and streams do nothing."""
    folder = Path(torch.__file__).parent / "lib"
    hooks = ctypes.CDLL(str(folder / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    c10 = ctypes.CDLL(str(folder / "libc10.so"))
    allocator = c10._ZN3c1015GetCPUAllocatorEv
    hooks.restype = allocator.restype = ctypes.c_void_p

    def answer(kind: Any, value: Any) -> Any:
        return ctypes.CFUNCTYPE(kind, ctypes.c_void_p)(lambda _: value)

    yes, nothing = answer(ctypes.c_bool, True), answer(None, None)
    pinned = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: allocator())
    # Places in the table of virtual functions, by the order of AcceleratorHooksInterface.h and
    # CUDAHooksInterface.h: isBuilt, isAvailable, hasPrimaryContext, init, deviceCount,
    # setCurrentDevice, getCurrentDevice, getPinnedMemoryAllocator, hasCUDA.
    places = {2: yes, 3: yes, 4: yes, 5: nothing, 6: answer(ctypes.c_int8, 1), 7: nothing,
              8: answer(ctypes.c_int8, 0), 12: pinned, 16: yes}  # fmt: skip
    table = ctypes.c_void_p.from_address(hooks())
    new = (ctypes.c_void_p * 64)(*(ctypes.c_void_p * 64).from_address(table.value - 16))
    for place, function in places.items():
        new[place + 2] = ctypes.cast(function, ctypes.c_void_p).value
    table.value = ctypes.addressof(new) + 16

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.CUDA

    guard, slots = Guard(), "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * 21).in_dll(c10, slots)
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    registry[1], registry[20] = registry[20], None  # CUDA's place, that of other devices
    KEPT.extend([new, places, guard])


class Stream:
    """A stream that is in order anyway; `LOG` tells what was asked of it, by the stream's name."""

    def __init__(self, device: Any = None, name: str = "own"):
        self.name, self.device = name, device

    def record_event(self) -> Event:
        return Event(self.name)

    def wait_event(self, event: Event) -> None:
        LOG.append((self.name, "waits for", event.stream))

    def __enter__(self) -> None:
        CURRENT.stream, self.before = self, getattr(CURRENT, "stream", USUAL)

    def __exit__(self, *_: object) -> None:
        CURRENT.stream = self.before


@dataclass
class Event:
    stream: str


class Generator(torch.Generator):
    """A generator of a device, whose numbers are the host's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        generator = super().__new__(cls, "cpu")
        HOMES[generator._cdata] = torch.device(device).type
        return generator


HOMES: dict[int, str] = {}  # address of a generator → its device
USUAL, CURRENT = Stream(name="usual"), threading.local()
LOG: list[tuple[str, str, str]] = []


def install(capability: tuple[int, int] = (9, 0), free: int = 80 << 30) -> None:
    """Make torch believe in one GPU of this compute capability, with so many bytes free."""
    if not torch.__version__.startswith(TORCH):
        raise RuntimeError(f"written for torch {TORCH}x, got {torch.__version__}: adapt TORCH")
    announce_device()
    everything, aten = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    KEPT.extend([everything, aten])
    everything.fallback(run_on_cpu, "CUDA")
    aten.impl("copy_", copy_, "CUDA")
    for name in ("source_Storage", "source_Storage_storage_offset", "source_Tensor"):
        aten.impl(f"set_.{name}", set_, "CUDA")
    for name in ("convolution", "convolution_backward", "_convolution"):  # made of others in torch
        operator = getattr(torch.ops.aten, name).default
        aten.impl(name, functools.partial(run_on_cpu, operator), "CUDA")
    storage, clone = torch.UntypedStorage, torch.UntypedStorage.clone
    storage.cpu, storage.to = storage_to_host, storage_to
    storage.clone = lambda s: clone(s) if s.device.type == "cpu" else storage_to(s, device="cuda")
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "max_memory_allocated": 0,
        "get_device_capability": capability, "mem_get_info": (free, free),
        "is_bf16_supported": True, "is_current_stream_capturing": False,
        "get_device_name": "pretended", "_lazy_init": None, "set_device": None,
        "empty_cache": None, "synchronize": None, "reset_peak_memory_stats": None,
        "memory_reserved": 0, "max_memory_reserved": 0, "get_rng_state": torch.zeros(1).byte(),
        "set_rng_state": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.Stream, torch.cuda.stream, torch.Generator = Stream, lambda stream: stream, Generator
    torch.cuda.current_stream = lambda *_: getattr(CURRENT, "stream", USUAL)


if not torch.cuda.is_available():
    install()
