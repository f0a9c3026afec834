"""What damaged files, wrong settings, full disks, kills and rivals do: one table.

    python benchmarks/reliability.py --quick

Each attack is tried in a process forked from this warm one, with a limit of time and memory, and
ends in one outcome. `sound` (the input's own grid and voxels, or the whole file) and `refused` (one
InputError that names the file or the option) are right; every other outcome is a fault, and the
exit code is 1. Writes benchmarks/results/reliability.json; with --attacks the other kinds keep
there what they had, each with the commit that it was tried on. A new kind of attack is a function
(work, config) → attempts, entered in ATTACKS.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from attack_bytes import attack_bytes
from attack_inputs import attack_inputs
from attack_json import attack_json
from attack_privacy import attack_identifiers, attack_sockets
from attack_scale import attack_scale
from attack_scripts import attack_full_scripts, attack_killed_scripts, attack_script_pairs
from attack_settings import attack_settings
from attack_signals import attack_signals
from attack_writes import attack_full_disk, attack_kills, attack_pairs
from attempts import FAULTS, REFUSED, SOUND, Attempt, Config
from machine import ROOT, machine

from data.files import read_json, write_json

ATTACKS: dict[str, Callable[[Path, Config], Iterator[Attempt]]] = {
    "bytes": attack_bytes,
    "full-disk": attack_full_disk,
    "kills": attack_kills,
    "pairs": attack_pairs,
    "killed-scripts": attack_killed_scripts,
    "full-scripts": attack_full_scripts,
    "script-pairs": attack_script_pairs,
    "inputs": attack_inputs,
    "identifiers": attack_identifiers,
    "sockets": attack_sockets,
    "settings": attack_settings,
    "json": attack_json,
    "scale": attack_scale,
    "signals": attack_signals,
}


@dataclass
class Row:
    """How the attempts of one row of the table ended."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # the first few, to repeat them
    told: str = ""  # by the last attempt that was sound

    def add(self, attempt: Attempt) -> None:
        self.counts[attempt.outcome] += 1
        if attempt.outcome in FAULTS and len(self.faults) < 5:
            self.faults.append(f"{attempt.outcome}: {attempt.detail}")
        elif attempt.outcome == SOUND:
            self.told = attempt.detail

    @property
    def wrong(self) -> int:
        return sum(self.counts[fault] for fault in FAULTS)

    def describe(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "faults": self.faults, "told": self.told}


def print_row(name: str, row: Row) -> None:
    """One line of the table, only the faults that occurred; below it the first of them."""
    faults = ", ".join(f"{row.counts[fault]} {fault}" for fault in FAULTS if row.counts[fault])
    tried, sound, refused = row.counts.total(), row.counts[SOUND], row.counts[REFUSED]
    print(f"{name:38} {tried:6} {sound:6} {refused:8}  {faults or '-'}", flush=True)
    for fault in row.faults:
        print(f"    {fault}", flush=True)


def cpu_seconds() -> float:
    """Of this process and of all that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_attack(name: str, config: Config, rows: dict[str, Row]) -> dict[str, Any]:
    """Try one kind; each row is printed once it is complete. Returns what it took."""
    work = config.work / name
    work.mkdir(parents=True)
    start, before, last, cut_short = time.monotonic(), cpu_seconds(), "", False
    print(f"-- {name}", flush=True)
    for attempt in ATTACKS[name](work, config):
        if attempt.row not in rows and last:
            print_row(last, rows[last])
        last = attempt.row
        detail = attempt.detail.replace(str(config.work), "WORK")  # no paths of this machine
        rows.setdefault(last, Row()).add(replace(attempt, detail=detail))
        if cut_short := time.monotonic() - start > config.limit_s:
            print(f"{name}: not finished after {config.limit_s:g} s (--limit-s)", flush=True)
            break
    if last:
        print_row(last, rows[last])
    seconds, cpu = time.monotonic() - start, cpu_seconds() - before
    print(f"   {seconds:.0f} s, {cpu:.0f} s of CPU", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return {"seconds": round(seconds, 1), "cpu_s": round(cpu, 1), "complete": not cut_short}


def name_commit() -> str:
    """The commit that is tried, with a + where files of it were changed."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    changed = ask("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return ask("rev-parse", "--short", "HEAD").strip() + "+" * bool(changed)


def merge_results(config: Config, tried: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was tried now, and before it of other kinds, as the JSON keeps it."""
    kinds: dict[str, dict[str, Any]] = {}
    if config.attacks and config.results.is_file():
        kinds = read_json(config.results).get("kinds", {})
    kinds = {name: (kinds | tried)[name] for name in ATTACKS if name in kinds | tried}
    outcomes = Counter()
    for kind in kinds.values():
        for row in kind["rows"].values():
            outcomes.update(row["counts"])
    return {
        "command": "python benchmarks/reliability.py" + " --quick" * config.quick,
        "machine": machine(),
        "tried": outcomes.total(),
        "faults": sum(outcomes[fault] for fault in FAULTS),
        "outcomes": {name: outcomes[name] for name in (SOUND, REFUSED, *FAULTS)},
        "kinds": kinds,
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)  # a process with torch's threads cannot be forked safely
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` switched it off
    shutil.rmtree(config.work, ignore_errors=True)
    print(f"{'attack':38} {'tried':>6} {SOUND:>6} {REFUSED:>8}  faults")
    commit, record = name_commit(), {}
    for name in config.attacks or ATTACKS:
        rows: dict[str, Row] = {}
        spent = run_attack(name, config, rows)
        told = {key: row.describe() for key, row in rows.items()}
        record = merge_results(
            replace(config, attacks=config.attacks or (name,)) if record else config,
            {name: {"commit": commit, "quick": config.quick} | spent | {"rows": told}},
        )
        write_json(record, config.results)
    shutil.rmtree(config.work, ignore_errors=True)
    print(f"{record['tried']} attempts, {record['faults']} faults")
    sys.exit(1 if record["faults"] else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
