"""Settings: how they are read from a command line, their ranges, and what is said on the way.

Light, so that `--help` and a wrong setting need no torch.
"""

from __future__ import annotations

import dataclasses
import io
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from tqdm import tqdm

from data.files import InputError
from data.signals import interruptible, leave_unbegun, set_handlers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")


# The range of every setting of every script; of several numbers each must lie in it.
RANGES = {
    "0 <= x < inf": "subvolume_depth folds fold workers noise_sd intensity_scaling "
    "intensity_shift weight_decay gradient_clip patience windows smoothing",
    "1 <= x < inf": "label_every input_size patches_per_case base_channels batch_size max_epochs "
    "val_interval "
    "window size",
    "0 <= x <= 1": "keep_empty training validation test foreground_sampling augment_probability "
    "translation flip_probability",
    "0 <= x < 1": "scaling ema_decay overlap",
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
        files = isinstance(value, tuple) and all(isinstance(item, Path) for item in value)
        if name not in LIMITS or value is None or files:  # the --folds of apply_model.py are files
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
) -> Any:
    """The config that a command line asks for; `--help` and mistakes end the program here.

    Scripts call it before they load what is heavy, so that nobody waits for a typing error.
    `recipes` maps a name, which may be the first word of the command line, to an explanation and
    the config whose values the options then override. The first recipe is the default.
    """
    set_handlers(leave_unbegun)
    words, chosen = [word for word in sys.argv[1:] if word != "--debug"], {}
    if recipes:
        named = bool(words) and not words[0].startswith("-")
        name = words.pop(0) if named else next(iter(recipes))
        if name not in recipes:
            sys.exit(f"error: the recipe must be one of {', '.join(recipes)}, got {name}")
        chosen = {"default": recipes[name][1]}
        lines = [f"    {key:<24}{text}" for key, (text, _) in recipes.items()]
        description = f"{description}\nRecipes (here: {name}):\n\n" + "\n".join(lines)
    flat = [tyro.conf.AvoidSubcommands]
    config = tyro.cli(config_class, args=words, description=description, config=flat, **chosen)
    if hasattr(config_class, "given"):
        config.given = list_given(words, config, chosen.get("default"))
    try:
        check_settings(config)
    except InputError as error:
        sys.exit(f"error: {error}")
    return config


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
    options = {re.split("=", word)[0].lstrip("-").replace("-", "_") for word in words}
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
        if name not in content:
            raise InputError(f"{what}: {name} is missing; {remedy}")
        if not isinstance(content[name], kind):
            got = type(content[name]).__name__
            raise InputError(f"{what}: {name} has the wrong type, got {got}; {remedy}")


def format_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def show_progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A progress bar on a terminal, in the first process; none in a log, nor with TQDM_DISABLE."""
    hidden = os.environ.get("RANK", "0") != "0" or os.environ.get("TQDM_DISABLE", "0") not in (
        "",
        "0",
    )
    return tqdm(
        iterable, disable=hidden or None, leave=False, **options
    )  # None: asks for a terminal


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
