"""Settings: how they are read from a command line, their ranges, and what is said on the way.

Light, so that `--help` and a wrong setting need no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
import dataclasses
import functools
import importlib
import inspect
import io
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar, get_type_hints

import tyro
from tqdm import tqdm

from data.files import InputError, read_json

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
ECHO_SECONDS = 0.5  # in which a second signal is the first one's: to a process, then to its group
CLEANING_SECONDS = 3.0  # in which no other signal disturbs the cleaning up after the first


class Interrupt:
    """Handler of both signals: KeyboardInterrupt, but not again while the first is cleaned up."""

    last = -math.inf  # moment of the first one, of the whole process

    def __call__(self, *_: Any) -> None:
        if time.monotonic() - Interrupt.last > CLEANING_SECONDS:
            Interrupt.last = time.monotonic()
            raise KeyboardInterrupt


def set_handlers(handler: Any) -> dict[signal.Signals, Any]:
    """Let both signals call `handler`; returns those before, for `restore_handlers`.

    Outside the main thread nothing is set, nor for Ctrl-C where the shell switched it off.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    kinds = [kind for kind in USUAL if signal.getsignal(kind) is not signal.SIG_IGN]
    return {kind: signal.signal(kind, handler) for kind in kinds}


def restore_handlers(before: dict[signal.Signals, Any]) -> None:
    """Undo `set_handlers`."""
    for kind, handler in before.items():
        signal.signal(kind, handler)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Both do nothing; a process that is started in here ignores them from its first moment."""
    before = set_handlers(signal.SIG_IGN)
    try:
        yield
    finally:
        restore_handlers(before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Both raise KeyboardInterrupt, once; what follows it is left alone, to the program's end."""
    before: dict[signal.Signals, Any] = set_handlers(Interrupt())
    atexit.register(set_handlers, signal.SIG_IGN)  # Python's own end would die of the next one
    try:
        yield
    except KeyboardInterrupt:
        before = {}
        raise
    finally:
        restore_handlers({k: USUAL[k] if h is leave_unbegun else h for k, h in before.items()})


def leave_unbegun(*_: Any) -> None:
    """Handler while a script loads its libraries: there is nothing to clean up."""
    told = "interrupted before anything was begun; run the same command again\n"
    with contextlib.suppress(OSError):
        os.write(2, (b"\r" if os.isatty(2) else b"") + told.encode())  # over the bar
    os._exit(130)


@contextlib.contextmanager
def delayed_interrupt(usual: bool = False) -> Iterator[Callable[[], bool]]:
    """Both only raise a flag, so that the step under way is finished; yields its reader.

    The first one is told at once, the second one ends the process at once: by a thread, because
    Python's own handlers wait for a step's long calls into torch. Outside the main thread, or
    with `usual`, both keep their meaning.
    """
    if usual or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    before = set_handlers(lambda *_: asked.set())
    wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_signals, args=(read_end, tuple(before)), daemon=True)
    watcher.start()
    try:
        yield asked.is_set
    finally:
        if asked.is_set():
            Interrupt.last = time.monotonic()
        signal.set_wakeup_fd(wakeup)
        restore_handlers(before)
        write_end.close()  # ends the watcher
        watcher.join()
        read_end.close()


def _watch_signals(stream: socket.socket, numbers: tuple[int, ...]) -> None:
    """Tell of the first interrupt as it comes, end the process at the second."""
    first = None
    while received := stream.recv(1):
        if received[0] not in numbers:
            continue
        if first is None:
            first = time.monotonic()
            _tell("\nfinishing this step; Ctrl-C again stops at once")
        elif time.monotonic() - first > ECHO_SECONDS:
            _tell("stopped at once; run again with --resume")
            os._exit(130)


def _tell(line: str) -> None:
    """A line on standard error, if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours, cursors, bells


class Copied:
    """A stream whose whole lines are written into a log too, as they stand in the end: of a
    progress bar, which goes back to the line's beginning for each picture, nothing."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream, self.log, self.rest = stream, log, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.stream.write(text)
        *lines, rest = (self.rest + text).split("\n")
        self.rest = rest[rest.rfind("\r") + 1 :]
        with contextlib.suppress(OSError, ValueError):  # a full disk: the checkpoints will tell
            for line in lines:
                shown = line.rstrip("\r").rpartition("\r")[2]
                self.log.write(CONTROL.sub("", shown).rstrip() + "\n")
        return len(text)


@contextlib.contextmanager
def keep_log(path: Path) -> Iterator[None]:
    """Append to a text file what the terminal is told: the command, each line, the last error.

    A log that is alone in its folder is removed: nothing was begun.
    """
    before = sys.stdout, sys.stderr
    try:
        with path.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} python {shlex.join(sys.argv)}\n")
            sys.stdout, sys.stderr = (Copied(stream, log) for stream in before)  # type: ignore[assignment]  # all that print and bars need
            try:
                yield
            except BaseException as error:
                log.write(f"{type(error).__name__}: {error}\n")
                raise
            finally:
                sys.stdout, sys.stderr = before
    finally:
        with contextlib.suppress(OSError):
            if [one for one in path.parent.iterdir() if one.name[0] != "."] == [path]:
                path.unlink()


Kind = TypeVar("Kind", bound="DataclassInstance")


NETWORK_LIBRARIES = ("nibabel", "torch", "monai")  # seconds, of a script that runs a network

# The range of every setting of every script; of several numbers each must lie in it.
RANGES = {
    "0 <= x < inf": "subvolume_depth folds workers noise_sd intensity_scaling "
    "intensity_shift weight_decay gradient_clip patience windows smoothing",
    "1 <= x < inf": "label_every input_size patches_per_case base_channels batch_size max_epochs "
    "val_interval "
    "window size",
    "0 <= x <= 1": "keep_empty training validation test foreground_sampling augment_probability "
    "translation flip_probability",
    "0 <= x < 1": "scaling ema_decay pretrained_share overlap dropout",
    "0 < x < inf": "learning_rate",
    "0 <= x <= 180": "rotation_degrees",
    "0.05 <= x <= 50": "spacing",
    "-inf < x < inf": "hu_window",
    "-32768 <= x <= 32767": "background",
    "0 <= x < 4294967296": "seed",
}


LIMITS = {name: limits for limits, names in RANGES.items() for name in names.split()}


COMPARISONS = {"<": operator.lt, "<=": operator.le}


DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


ASCENDING = ("hu_window",)  # low, high
SEVERAL = ("hu_window", "input_size", "size", "spacing", "window")  # one number per axis or end


def check_settings(settings: Any, where: str = "") -> None:
    """Refuse a setting outside its range: of a Config, or of a mapping that was read from a file.

    Raises InputError with the option, what was given and what is expected. NaN is in no range.
    """
    values = settings if isinstance(settings, Mapping) else vars(settings)
    for name, value in values.items():
        option = f"{where}--{name.replace('_', '-')}"
        if name == "device" and not DEVICES.fullmatch(str(value)):
            raise InputError(f"{option} must be auto, cpu, cuda, cuda:1 or mps, got {value}")
        if name not in LIMITS or value is None:
            continue
        if name == "folds" and isinstance(value, tuple):  # checkpoints, of apply_model.py
            continue
        if value == "median" and name == "spacing" and values is not settings:  # of train.py
            continue
        low, above, _, below, high = LIMITS[name].split()
        several = name in SEVERAL and isinstance(value, tuple | list)
        for number in value if several else [value]:
            if (
                not isinstance(number, int | float)
                or not COMPARISONS[above](float(low), number)
                or not COMPARISONS[below](number, float(high))
            ):
                expected = LIMITS[name].removesuffix(" < inf").removeprefix("-inf < ")
                raise InputError(f"{option} must be a number {expected}, got {value}")
        if name in ASCENDING and not (several and len(value) == 2 and value[0] < value[1]):
            raise InputError(f"{option} must be low, then high, got {value}")


def command_line(main: Callable[[Any], None], config_class: type, description: str | None) -> None:
    """Run `main(config)`, config from the command line."""
    run_script(main, read_settings(config_class, description))


def read_settings(
    config_class: type,
    description: str | None,
    recipes: dict[str, tuple[str, Any]] | None = None,
    check: Callable[[Any], Any] | None = None,
    libraries: Sequence[str] = (),
) -> Any:
    """The config that a command line asks for; `--help` and mistakes end the program here.

    Scripts call it before they load what is heavy, so that nobody waits for a typing error.
    `recipes` maps a name, which may be the first word of the command line, to an explanation and
    the config whose values the options then override. The first recipe is the default. `check`
    raises InputError for a config that asks for what is not there. `libraries` take seconds, and
    are loaded here last, under the first bar.
    """
    set_handlers(leave_unbegun)
    words, default = [word for word in sys.argv[1:] if word != "--debug"], None
    if recipes:
        named = bool(words) and not words[0].startswith("-")
        name = words.pop(0) if named else next(iter(recipes))
        if name not in recipes:
            sys.exit(f"error: the recipe must be one of {', '.join(recipes)}, got {name}")
        default = recipes[name][1]
        lines = [f"    {key:<24}{text}" for key, (text, _) in recipes.items()]
        description = f"{description}\nRecipes (here: {name}):\n\n" + "\n".join(lines)
    parse = functools.partial(parse_words, config_class, default, description)
    try:
        words = [*read_saved(words, config_class, parse), *words]
        config = parse(words)
        check_settings(config)
        if check:
            check(config)
    except InputError as error:
        sys.exit(f"error: {error}")
    if hasattr(config_class, "given"):
        config.given = list_given(words, config, default)
    load_libraries(libraries)
    return config


# ---------------------------------------------------------------------------------------
# Options: of each setting one, in the groups that its class has
# ---------------------------------------------------------------------------------------

SETTING = re.compile(r"    (\w+): .*?(?:  # (.*))?")  # a line of a class: name, comment
GROUP = "group_"  # begins the names of fields that hold a group
Saved = Annotated[
    Path | None,
    tyro.conf.arg(
        help="JSON with settings, such as a run's config.json, or the run's folder; options that "
        "are given win"
    ),
]


def parse_words(
    config_class: type, default: Any, description: str | None, words: list[str], **how: Any
) -> Any:
    """The config of a command line; `default` has the values of what is not given."""
    markers = [tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes]
    grouped = group_settings(config_class, default)
    found = vars(tyro.cli(grouped, args=words, description=description, config=markers, **how))
    del found["config"]
    values: dict[str, Any] = {}
    for name, value in found.items():
        values |= vars(value) if name.startswith(GROUP) else {name: value}
    return config_class(**values)


def group_settings(config_class: type, default: Any) -> type:
    """The same settings as a class with a class for each section; on the command line all flat."""
    hints, about = get_type_hints(config_class, include_extras=True), read_comments(config_class)
    groups: dict[str, list[Any]] = {"": [("config", Saved, None)]}
    for item in dataclasses.fields(config_class):
        section, comment = about.get(item.name, ("", ""))
        kind: Any = Annotated[hints[item.name], tyro.conf.arg(help=comment or None)]
        begin: dict[str, Any] = {"default": item.default, "default_factory": item.default_factory}
        if default is not None:
            begin = {"default_factory": functools.partial(getattr, default, item.name)}
        groups.setdefault(section, []).append((item.name, kind, dataclasses.field(**begin)))
    whole = groups.pop("")
    for number, (section, fields) in enumerate(groups.items()):
        part = dataclasses.make_dataclass("Options", fields, kw_only=True)
        box: Any = Annotated[part, tyro.conf.arg(name=section, help="")]
        whole.append((f"{GROUP}{number}", box, dataclasses.field(default_factory=part)))
    return dataclasses.make_dataclass(config_class.__name__, whole, kw_only=True)


def read_comments(config_class: type) -> dict[str, tuple[str, str]]:
    """Setting → section and comment, from the lines of its class.

    `# -- title` begins a section. A comment stands behind its setting and in the lines below; one
    with nothing above it but a blank line or a title is of the setting that follows.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for owner in reversed(config_class.__mro__[:-1]):
        section, above = "", list[str]()
        current: list[str] | None = None
        for line in inspect.getsource(owner).splitlines():
            text = line.strip().removeprefix("#").strip()
            if line.startswith("    # -- "):
                section, above, current = text.removeprefix("-- "), [], None
            elif match := SETTING.fullmatch(line):
                above, current = [], above + [match[2] or ""]
                found[match[1]] = section, current
            elif line.startswith("    # "):
                (above if current is None else current).append(text)
            else:
                above, current = [], None
    return {name: (section, " ".join(texts).strip()) for name, (section, texts) in found.items()}


def read_saved(words: Sequence[str], config_class: type, parse: Callable[..., Any]) -> list[str]:
    """What `--config` of a command line stands for: a JSON file's settings, or those of a run."""
    given = [part for word in words for part in word.split("=", word.startswith("--config="))]
    if "--config" not in given[:-1]:
        return []
    path = Path(given[given.index("--config") + 1])
    path = path / "config.json" if path.is_dir() else path
    content = read_json(path, "a JSON object of settings")
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object of settings, got {content!r:.60}")
    if unknown := sorted(content.keys() - {item.name for item in dataclasses.fields(config_class)}):
        raise InputError(f"{path}: no such setting: {', '.join(unknown)}; correct it, see --help")
    # of "median", which only a whole config may have, the command line decides
    check_settings({n: v for n, v in content.items() if v != "median"}, f"{path}: ")
    options = {name: spell_option(name, value) for name, value in content.items()}
    try:
        parse([word for option in options.values() for word in option], console_outputs=False)
    except SystemExit:
        for name, option in options.items():  # one by one: which is it?
            try:
                parse(option, console_outputs=False)
            except SystemExit:
                expected = f"{name} must be as --help says, got {content[name]!r}"
                raise InputError(f"{path}: {expected}; correct it") from None
    return [word for option in options.values() for word in option]


def spell_option(name: str, value: Any) -> list[str]:
    """The words of a command line that give a setting this value."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, dict):
        value = [f"{key}={','.join(map(str, values))}" for key, values in value.items()]
    return [f"--{option}", *map(str, value if isinstance(value, list) else [value])]


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Run `main(config)`; a user's fault ends in one line and exit code 1.

    Ctrl-C and SIGTERM end in exit code 130 and a line that says how to go on. With `--debug`, or
    LIVER_DEBUG=1, every error shows its traceback.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("LIVER_DEBUG"))
    for stream in (sys.stdout, sys.stderr):  # names of files need be no UTF-8, nor a console
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interruptible():
            main(config)
    except KeyboardInterrupt as stop:
        print(f"interrupted; {str(stop) or 'run the same command again to go on'}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, InputError | OSError):
            sys.exit(f"error: {error}")
        what = f"{type(error).__name__}: {error}"
        sys.exit(f"error: {what}; run again with LIVER_DEBUG=1 for the traceback")


def list_given(words: Sequence[str], config: Any, recipe: Any = None) -> frozenset[str]:
    """Names of the settings that a command line gives, by option or by the name of a recipe."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    options = [option.lstrip("-").replace("-", "_") for option in options]
    names = {item.name for item in dataclasses.fields(config)}
    plain = type(config)() if recipe else None
    of_recipe = {n for n in names if recipe and getattr(recipe, n) != getattr(plain, n)}
    return frozenset(of_recipe | {n for n in names if n in options or f"no_{n}" in options})


def pick(kind: type[Kind], source: Any, **changes: Any) -> Kind:
    """A dataclass of `kind` from the equally named attributes of `source`, `changes` before them.

    A list becomes a tuple, as JSON and command lines give lists.
    """
    values = {}
    for item in dataclasses.fields(kind):
        value = changes[item.name] if item.name in changes else getattr(source, item.name)
        values[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def check_types(content: Any, kinds: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise InputError unless `content` is a dictionary whose entries have these types."""
    if not isinstance(content, dict):
        raise InputError(f"{what}: must be a dictionary, got {type(content).__name__}; {remedy}")
    for name, kind in kinds.items():
        if name not in content and not isinstance(None, kind):  # what may be None may be left out
            raise InputError(f"{what}: {name} is missing; {remedy}")
        if not isinstance(content.get(name), kind):
            got = type(content[name]).__name__
            raise InputError(f"{what}: {name} has the wrong type, got {got}; {remedy}")


def format_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


LOADING = "{desc} |{bar:10}| {n_fmt}/{total_fmt}"  # no rate: libraries take unlike times


def show_progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A progress bar on a terminal, in the first process; none in a log, nor with TQDM_DISABLE."""
    hidden = not is_first_process() or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    how: dict[str, Any] = {"disable": hidden or None, "leave": False}  # None: asks for a terminal
    return tqdm(iterable, **how, **options)


def load_libraries(names: Sequence[str]) -> None:
    """Import, under a bar, what the imports below then find loaded."""
    with show_progress(names, unit="library", bar_format=LOADING) as bar:
        for name in bar:
            bar.set_description(f"loading {name}")
            importlib.import_module(name)


def is_first_process() -> bool:
    """Whether this is the one process, or under torchrun the first of several: it alone talks."""
    return os.environ.get("RANK", "0") == "0"


def human_bytes(count: float) -> str:
    """1536 → `1.5 KB`; steps of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def parse_classes(words: list[str]) -> dict[str, tuple[str, ...]]:
    """`["liver=liver,tumour"]` → {"liver": ("liver", "tumour")}."""
    pairs = (word.partition("=") for word in words)
    return {name: tuple((values or name).split(",")) for name, _, values in pairs}


Classes = Annotated[  # on the command line: --labels liver=liver,tumour or liver=1 tumour=2
    dict[str, tuple[str, ...]],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=LABEL,…",
        instance_from_str=parse_classes,
        is_instance=lambda classes: isinstance(classes, dict),
        str_from_instance=lambda classes: [
            f"{n}={','.join(map(str, classes[n]))}" for n in classes
        ],
    ),
]
