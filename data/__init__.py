"""Scans, label maps, results and settings: all code that needs no network."""

import importlib.util
import sys

if importlib.util.find_spec("tyro") is None:  # before a script shows a traceback
    sys.exit(
        "error: the packages of requirements.txt are not installed for this Python; activate the "
        "environment: source .venv/bin/activate, or make it first: make demo"
    )
