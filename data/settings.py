"""Settings from a command line or a JSON file and their ranges; signals, progress bars, exit codes.

It imports no torch, so that `--help` and a wrong setting are answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import math
import os
import re
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tqdm import tqdm
from tyro.conf import Positional as Positional  # for the arguments of a script

from data.files import InputError, explain, read_json

Kind = TypeVar("Kind")
human_bytes = functools.partial(tqdm.format_sizeof, suffix="B", divisor=1024)  # 1536 → 1.50kB
format_seconds = tqdm.format_interval  # 75 → 01:15
NETWORK_LIBRARIES = ("nibabel", "torch", "monai")  # they take seconds to load


class Limit(typing.NamedTuple):
    """The range of a setting: in words, and as a test that NaN does not pass."""

    text: str
    test: Callable[[Any], Any]


VERSION = "0.1.0"  # of this program, as in CITATION.cff

# Types for the fields of a Config.
Share = Annotated[float, Limit("a number 0 <= x <= 1", lambda x: 0 <= x <= 1)]
Part = Annotated[float, Limit("a number 0 <= x < 1", lambda x: 0 <= x < 1)]
Amount = Annotated[float, Limit("a number 0 <= x", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Limit("a number 0 < x", lambda x: 0 < x < math.inf)]
Degrees = Annotated[float, Limit("a number 0 <= x <= 180", lambda x: 0 <= x <= 180)]
Spacing = Annotated[float, Limit("a number 0.05 <= x <= 50", lambda x: 0.05 <= x <= 50)]
Whole = Annotated[int, Limit("a number 0 <= x", lambda x: x >= 0)]
Count = Annotated[int, Limit("a number 1 <= x", lambda x: x >= 1)]
Seed = Annotated[int, Limit("a number 0 <= x < 4294967296", lambda x: 0 <= x < 2**32)]
Int16 = Annotated[int, Limit("a number -32768 <= x <= 32767", lambda x: -32768 <= x <= 32767)]
HuWindow = Annotated[
    tuple[float, float], Limit("low, then high", lambda w: -math.inf < w[0] < w[1] < math.inf)
]
DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
Device = Annotated[str, Limit("auto, cpu, cuda, cuda:1 or mps", DEVICES.fullmatch)]
Classes = Annotated[  # on the command line: --labels liver=liver,tumour or liver=1 tumour=2
    dict[str, tuple[str, ...]],
    tyro.constructors.PrimitiveConstructorSpec(
        "*", "NAME=LABEL,…",
        lambda words: {w.partition("=")[0]: tuple(w.rpartition("=")[2].split(",")) for w in words},
        lambda classes: isinstance(classes, dict),
        lambda classes: [f"{name}={','.join(map(str, of))}" for name, of in classes.items()],
    ),
]  # fmt: skip


def fit(value: Any, hint: Any) -> Any:
    """Return a value, perhaps of JSON, in the type of its annotation; ValueError says the range."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    plain = int | float if hint is float else hint
    if kind is Annotated:
        value = fit(value, parts[0])
        for limit in parts[1:]:
            if isinstance(limit, Limit) and not limit.test(value):
                raise ValueError(limit.text)
        return value
    if kind in (typing.Union, types.UnionType):
        fitting = [part for part in parts if part is not type(None) or value is None]
        for part in fitting[1:]:
            with contextlib.suppress(ValueError):
                return fit(value, part)
        return fit(value, fitting[0])
    if kind is tuple and isinstance(value, list | tuple):
        if parts[-1] is ... or len(parts) == len(value):
            return tuple(fit(v, parts[0 if ... in parts else n]) for n, v in enumerate(value))
    elif kind is dict and isinstance(value, dict):
        return {key: fit(content, parts[1]) for key, content in value.items()}
    elif kind is typing.ClassVar or (kind is typing.Literal and value in parts):
        return value
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif kind is None and isinstance(value, plain) and isinstance(value, bool) <= (hint is bool):
        return value
    raise ValueError("a number" if hint in (int, float) else "as --help says")


def check_settings(settings: Any, where: str = "", kind: type | None = None) -> dict[str, Any]:
    """Return the values of a dataclass, or of a mapping with fields of the class `kind`. Raises
    InputError for a value that does not fit the annotation of its field."""
    values = settings if isinstance(settings, Mapping) else vars(settings)
    hints, found = typing.get_type_hints(kind or type(settings), include_extras=True), {}
    for name in [name for name in values if name in hints]:
        try:
            found[name] = fit(values[name], hints[name])
        except ValueError as fault:
            option = f"{where}--{name.replace('_', '-')}"
            raise InputError(f"{option} must be {fault}, got {values[name]!r:.60}") from fault
    return found


def read_settings(
    config_class: type,
    description: str | None,
    recipes: dict[str, tuple[str, Any]] | None = None,
    check: Callable[[Any], Any] | None = None,
    libraries: Sequence[str] = (),
) -> Any:
    """Return the config that a command line asks for; `--help` and mistakes end the program.
    `recipes`: name, which may be the first word → explanation and config, whose values the options
    override. `check` raises InputError for what is missing. `libraries` are loaded last."""
    open_streams()
    os.environ["MPLBACKEND"] = "agg"  # files alone are drawn; another one may not be there
    words = [word for word in sys.argv[1:] if word != "--debug"]
    if {"-h", "--help"} & {*words} and hasattr(signal, "SIGPIPE"):  # `--help | head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if "--version" in words:
        print(f"Liver segmentation in CT {VERSION}")
        sys.exit()
    default, given = None, list_given(words, config_class)
    general = "--config FILE: settings of a JSON file or run; options win."
    description = f"{description}\n\n{general} --version: that of this program."
    if recipes:
        name = words.pop(0) if words and words[0][0] != "-" else next(iter(recipes))
        if name not in recipes:
            sys.exit(f"error: the recipe must be one of {', '.join(recipes)}, got {name}")
        default, plain = recipes[name][1], config_class()
        given |= {n for n, value in vars(default).items() if value != getattr(plain, n)}
        lines = [f"    {key:<24}{text}" for key, (text, _) in recipes.items()]
        description = f"{description}\nRecipes (here: {name}):\n\n" + "\n".join(lines)
    try:
        words, saved = take_saved(words, config_class)
        if saved:
            needed = (f for f in dataclasses.fields(config_class) if f.default is f.default_factory)
            blank = default or config_class(**{f.name: tyro.MISSING for f in needed})
            default = dataclasses.replace(blank, **saved)
        how: Any = {"prog": Path(sys.argv[0]).name, "description": description, "default": default}
        config: Any = tyro.cli(config_class, args=words, **how)
        check_settings(config)
        if check:
            check(config)
    except InputError as error:
        sys.exit(f"error: {error}")
    if hasattr(config_class, "given"):
        config.given = given | saved.keys()
    for library in show_progress(libraries, desc="loading libraries", unit="library"):
        importlib.import_module(library)
    return config


def open_streams() -> None:
    """Let the standard streams print any name of a file; those that are closed lead nowhere, and
    no file gets their numbers."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("r+", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def take_saved(words: list[str], config_class: type) -> tuple[list[str], dict[str, Any]]:
    """Return a command line without its `--config FILE`, and the settings in that file."""
    parts = [part for word in words for part in word.split("=", word.startswith("--config="))]
    if "--config" not in parts[:-1]:
        return words, {}
    place = parts.index("--config")
    path = Path(parts[place + 1])
    words = parts[:place] + parts[place + 2 :]
    return words, read_saved(path / "config.json" if path.is_dir() else path, config_class)


def read_saved(path: Path, config_class: Any) -> dict[str, Any]:
    """Return the settings in a JSON file; InputError unless all are fields of the class."""
    content = read_json(path, "a JSON object of settings")
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object of settings, got {content!r:.60}")
    if unknown := sorted(content.keys() - {item.name for item in dataclasses.fields(config_class)}):
        raise InputError(f"{path}: no such setting: {', '.join(unknown)}; correct it, see --help")
    return check_settings(content, f"{path}: ", config_class)


def list_given(words: Sequence[str], config_class: Any) -> frozenset[str]:
    """Return the names of the settings that a command line gives by options."""
    options = {re.sub("^--(no-)?|=.*", "", word).replace("-", "_") for word in words}
    return frozenset(options & {item.name for item in dataclasses.fields(config_class)})


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Run `main(config)`; a user's fault ends in one line and exit code 1, a signal in 130. With
    `--debug`, or LIVER_DEBUG=1, every error shows its traceback."""
    open_streams()
    try:
        with handle_signals(signal.default_int_handler):
            main(config)
    except KeyboardInterrupt as stop:
        print(f"interrupted; {str(stop) or 'run the same command again to go on'}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv or os.environ.get("LIVER_DEBUG"):
            raise
        if isinstance(error, InputError | OSError):
            sys.exit(f"error: {error}")
        sys.exit(f"error: {explain(error)}; run again with LIVER_DEBUG=1 for the traceback")


@contextlib.contextmanager
def handle_signals(handler: Any) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `handler` meanwhile, in the main thread and if not ignored."""
    kinds = [k for k in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(k) != signal.SIG_IGN]
    main = threading.current_thread() is threading.main_thread()
    before = {kind: signal.signal(kind, handler) for kind in kinds} if main else {}
    try:
        yield
    finally:
        for kind, usual in before.items():
            signal.signal(kind, usual)


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield whether a signal came, so that a step is finished; the next raises KeyboardInterrupt.
    `timeout` and torchrun signal twice within a second, which counts once."""
    moments: list[float] = []

    def ask(*_: Any) -> None:
        moments.append(time.monotonic())
        if len(moments) == 1:
            os.write(2, b"\nfinishing this step; Ctrl-C again stops at once\n")
        elif moments[-1] - moments[0] > 1:
            raise KeyboardInterrupt

    with handle_signals(ask):
        yield lambda: bool(moments)


def pick(kind: type[Kind], source: Any, **changes: Any) -> Kind:
    """Return a dataclass with the equally named attributes of `source`, `changes` before them."""
    names = [item.name for item in dataclasses.fields(typing.cast(Any, kind))]
    values = {n: changes[n] if n in changes else getattr(source, n) for n in names}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def check_types(content: Any, kinds: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise InputError unless `content` is a dictionary whose entries have these types."""
    if not isinstance(content, dict):
        raise InputError(f"{what}: must be a dictionary, got {type(content).__name__}; {remedy}")
    for name, kind in kinds.items():  # what may be None may be left out
        if not isinstance(content.get(name), kind):
            wrong = f"has the wrong type, got {type(content.get(name)).__name__}"
            fault = wrong if name in content else "is missing"
            raise InputError(f"{what}: {name} {fault}; {remedy}")


def show_progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a progress bar, on a terminal and in the first process; TQDM_DISABLE hides it."""
    hidden = not is_first_process() or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(iterable, disable=hidden or None, leave=False, **options)


def is_first_process() -> bool:
    """Return whether this process is alone, or under torchrun the first of several."""
    return os.environ.get("RANK", "0") == "0"
