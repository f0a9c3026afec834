"""What all benchmarks share: the project's root, on Python's path, and what they were measured on.

Imported first: what stands below `benchmarks/` may then import the project's modules.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"  # real scans and label maps, beside the project

sys.path.insert(0, str(ROOT))  # before `benchmarks/`, whose files bear the names of the scripts


def machine(torch_too: bool = False) -> dict[str, Any]:
    """Processor, cores, versions, and the code that is measured; no names of machines or people."""
    found = {"cpu": name_cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    found |= {"commit": head.strip(), "sources": sum_sources()}
    if torch_too:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        found |= {"threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}
    return found


def sum_sources() -> dict[str, str]:
    """File → checksum of the six scripts and `data/`, on which every figure depends."""
    files = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
    sums = {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {name: sums[name][:12] for name in sorted(sums)}


def name_cpu() -> str:
    """The processor as Linux has it, else as Python knows it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def name_command() -> str:
    """The command line that was given, as the record keeps it."""
    return " ".join(["python", *(word.replace(f"{ROOT}/", "") for word in sys.argv)])


def peak_mb() -> int:
    """Largest memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
