"""Wrong settings of the five scripts: each is refused in one line that names it."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from attempts import REFUSED, TINY, Attempt, Config, Demo, Outcome, build_demo, try_forked

from data.files import InputError
from data.settings import LIMITS, check_settings, read_settings, run_script

SCRIPTS = ("prepare", "preprocess", "train", "apply_model", "visualize_3d")
SMALL = f"--data {{prepared}} --run-folder {{work}}/new --max-epochs 1 {TINY}"
# Command lines that cannot work; {…} are folders of a small sound pipeline. The word behind | is
# what the refusal must hold.
MISTAKES = {
    "prepare": """
        {raw}/nothing --destination {work}/p | nothing
        {run} --destination {work}/p | run
        {raw} --destination {raw}/dataset.json | dataset.json
        {raw} --destination {work}/p --training 0.9 | add up
        {raw} --destination {work}/p --training 0 --validation 0.5 --test 0.5 | training
        {raw} --destination {work}/p --folds 1 | folds
        {raw} --destination {work}/p --folds 50 | folds
        {raw} --destination {work}/p --patient-pattern ( | patient-pattern
        {raw} --destination {work}/p --patient-pattern nothing | patient-pattern
        {raw} --destination {work}/p --split {work}/no.json | no.json
        {raw} --destination {work}/p --split {run}/config.json | config.json
        {raw} --destination {work}/p --patients {work}/no.csv | no.csv
        {raw} --destination {work}/p --patients {run}/metrics.csv | metrics.csv
        {raw} --destination {work}/p --values liver | values
        {raw} --destination {work}/p --values liver=x | values
        {raw} --destination {work}/p --values liver=1 tumour=1 | values
        {raw} --destination {work}/p --values liver=99999999 | values
        {raw} --destination {work}/p --values liver=1 | errors
        {raw} --destination {work}/p --foreground kidney | kidney
        {raw} --destination {work}/p --foreground background | background
        {raw} --destination {work}/p --foreground 9 | 9
        {raw} --destination {work}/p --images {raw}/imagesTr | labels
        {raw} --destination {work}/p --labels {raw}/labelsTr | images
        {raw} --destination {work}/p --images {work}/no --labels {raw}/labelsTr | no
        {raw} --destination {prepared} --images {raw}/labelsTr --labels {raw}/imagesTr | errors
        {raw} --destination {work}/p --modality PET | modality
        {raw} --destination {work}/p --accept everything | accept
        {raw} --destination {work}/p --label-every x | label-every
        {raw}/imagesTr --destination {prepared} | imagesTr
        {raw} --destinaton {work}/p | destinaton
    """,
    "preprocess": """
        --data {work}/nothing | nothing
        --data {raw} | dataset.json
        --data {prepared} --input-size 30 30 | input
        --data {prepared} --spacing 1 | spacing
    """,
    "train": f"""
        --data {{work}}/nothing | nothing
        --data {{raw}} | dataset.json
        --data {{prepared}} --run-folder {{run}} | run
        nonsense | recipe
        {SMALL} --input-size 33 32 | multiple
        {SMALL} --input-size 32 | input-size
        {SMALL} --spacing 1 1 1 | spacing
        {SMALL} --sampling patches | sampling
        {SMALL} --labels liver=kidney | kidney
        {SMALL} --labels a=1 b=1 | labels
        {SMALL} --labels a=0 | labels
        {SMALL} --labels a=77 | 77
        {SMALL} --hu-window 250 -200 | hu-window
        {SMALL} --hu-window 1 1 | hu-window
        {SMALL} --optimizer sgd --amsgrad | amsgrad
        {SMALL} --optimizer rmsprop | optimizer
        {SMALL} --loss mse | loss
        {SMALL} --network resnet | network
        {SMALL} --schedule never | schedule
        {SMALL} --precision int8 | precision
        {SMALL} --device tpu | device
        {SMALL} --device cuda:9 | cuda
        {SMALL} --pretrained {{work}}/no.pt | no.pt
        {SMALL} --pretrained {{run}}/config.json | config.json
        {SMALL} --pretrained {{run}}/last.pt --base-channels 8 | pretrained
        {SMALL} --pretrained {{run}}/last.pt --network unet | pretrained
        {SMALL} --resume {{work}}/no | no
        --resume {{run}}/config.json | config.json
        --resume {{run}}/best.pt --max-epochs 3 | last.pt
        --resume {{run}} --learning-rate 0.5 | learning_rate
        --resume {{run}} --network unet | network
        {SMALL} --learning-rate x | learning-rate
        {SMALL} --epochs 3 | epochs
    """,
    "apply_model": """
        | nothing to segment
        {work}/nothing.nii.gz --checkpoint {run} | nothing
        {run} --checkpoint {run} | run
        {raw}/imagesTr --checkpoint {work}/no.pt | no.pt
        {raw}/imagesTr --checkpoint {run}/config.json | config.json
        {raw}/imagesTr --checkpoint {prepared} | prepared
        {raw}/imagesTr --checkpoint {run} --folds {work}/no.pt | no such checkpoint
        {raw}/imagesTr --checkpoint {run} --truth {work}/no | no
        {raw}/imagesTr --checkpoint {run} --truth {raw}/labelsTr {raw}/labelsTr | truth
        {raw}/imagesTr {raw}/imagesTr --checkpoint {run} | twice
        {raw}/imagesTr --checkpoint {run} --device tpu | device
        {raw}/imagesTr --checkpoint {run} --device cuda:9 | cuda
        {raw}/imagesTr --checkpoint {run} --precision int8 | precision
        {raw}/imagesTr --checkpoint {run} --overlap 1 | overlap
        {raw}/imagesTr --checkpoint {run} --background 1e9 | background
        {raw}/imagesTr --checkpoint {run} --destination {run}/config.json | config.json
        {scan} --checkpoint {run} --dicom-seg --destination {work}/r | dicom-seg
        --split test --data {work}/no --checkpoint {run} | no
        --split test --data {raw} --checkpoint {run} | dataset.json
        --split all --checkpoint {run} | split
        {raw}/labelsTr --checkpoint {run} --destination {work}/r | HU
    """,
    "visualize_3d": """
        {work}/nothing --screenshot {work}/a.png | nothing
        {results} --screenshot {work}/a.txt | screenshot
        {results} --mesh {work}/a.xyz | mesh
        {results} --turntable {work}/a.png | turntable
        {results} --movie {work}/a.png | movie
        {results} --html {work}/a.png | html
        --screenshot {work}/a.png | nothing to draw
        {results} --mode inside --screenshot {work}/a.png | mode
        {results} --view above --screenshot {work}/a.png | view
        {results} --size 0 0 --screenshot {work}/a.png | size
        {results} --smoothing -1 --screenshot {work}/a.png | smoothing
        {results} --mesh-space XYZ --mesh {work}/a.stl | mesh-space
        {scan} --label {work}/no.nii.gz --screenshot {work}/a.png | no
        {scan} --mode organs --screenshot {work}/a.png | label
        {run} --screenshot {work}/a.png | run
    """,
}


def list_mistakes(demo: Demo, work: Path) -> Iterator[tuple[str, list[str], str]]:
    """Script, words of a command line that cannot work, and what the refusal must hold."""
    scan = min((demo.raw / "imagesTr").iterdir())
    places = {
        "scan": scan,
        "raw": demo.raw,
        "prepared": demo.prepared,
        "run": demo.run,
        "work": work,
    }
    for script, lines in MISTAKES.items():
        for line in lines.strip().splitlines():
            words, _, expected = line.strip().rpartition("|")
            given = words.format(**places, results=demo.results).split()
            given += ["--workers", "1"] if script == "prepare" else []  # a pool takes long to begin
            yield script, given, expected.strip()


def run_main(script: str, words: list[str]) -> tuple[Any, str]:
    """Exit code and last words of a script, run in this process as from a command line."""
    module = importlib.import_module("train" if script == "preprocess" else script)
    sys.argv = [f"{script}.py", *words, *["--show"] * (script == "preprocess")]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            config = read_settings(module.Config, module.__doc__, getattr(module, "RECIPES", None))
            run_script(module.main, config)
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (end.code, told.getvalue())
    return 0, told.getvalue()


def judge_mistake(script: str, words: list[str], expected: str) -> Outcome:
    code, told = run_main(script, words)
    detail = f"{script}.py {' '.join(words)}: {told[-300:]}"
    if not code:
        return "accepted", detail
    if "LIVER_DEBUG" in told or "Traceback" in told:
        return "other exception", detail
    return (REFUSED if expected in told else "not named"), detail


# ---------------------------------------------------------------------------------------
# Ranges
# ---------------------------------------------------------------------------------------


def list_values(name: str) -> Iterator[Any]:
    """Values outside the range of a setting, at its ends too, and what is no number."""
    low, above, _, below, high = LIMITS[name].split()
    for end, mark, away in ((float(low), above, -1), (float(high), below, 1)):
        if math.isfinite(end):
            yield from [end + away, *[end] * (mark == "<")]
        elif mark == "<":
            yield end
    yield from (math.nan, "x", [1], {})


def list_ranges() -> Iterator[tuple[str, str, Any]]:
    """Script, setting and a value that it must refuse."""
    for script in SCRIPTS:
        module = importlib.import_module("train" if script == "preprocess" else script)
        config = module.Config()
        for item in fields(config):
            if item.name in LIMITS:
                many = isinstance(getattr(config, item.name), tuple)
                for value in list_values(item.name):
                    yield script, item.name, (value, value) if many else value


def judge_range(script: str, name: str, value: Any) -> Outcome:
    module = importlib.import_module("train" if script == "preprocess" else script)
    config, detail = module.Config(), f"{script}.py: {name} = {value!r}"
    setattr(config, name, value)
    try:
        check_settings(config)
    except InputError as error:
        named = f"--{name.replace('_', '-')}" in str(error)
        return (REFUSED if named else "not named"), f"{detail}: {error}"
    return "accepted", detail


def attack_settings(work: Path, config: Config) -> Iterator[Attempt]:
    """Each setting outside its range, and command lines that cannot work."""
    demo, _ = build_demo(config)
    ranges = list(list_ranges())
    for script in SCRIPTS:
        some = [entry for entry in ranges if entry[0] == script]
        yield from try_forked(f"ranges: {script}", len(some), lambda i, s=some: judge_range(*s[i]))
    mistakes = list(list_mistakes(demo, work))
    for script in SCRIPTS:
        given = [entry for entry in mistakes if entry[0] == script]
        judge = lambda i, s=given: judge_mistake(*s[i])  # noqa: E731
        yield from try_forked(f"settings: {script}", len(given), judge, batch=20)
