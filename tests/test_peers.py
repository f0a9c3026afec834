"""What is said of other programs is what was measured."""

from conftest import ROOT

from data.files import read_json


def test_the_table_of_other_programs_is_that_of_the_benchmark():
    result = read_json(ROOT / "benchmarks" / "results" / "peers.json")
    page = (ROOT / "docs" / "few_patients.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert result["rows"]
    for row in result["rows"]:
        for name, scan in row.get("scans", {}).items():  # none where nnU-Net made no plan
            program = f"| {row['program']}, `{row['configuration']}`, seed {row['seed']}"
            dice = [f"{scan[way]['dice']:.3f}" for way in ("as_it_is", "largest_component")]
            ours = find_ours(row["round"], row["seed"], name)
            start = f"{program} | {name} | {dice[0]} | {dice[1]} | {ours:.3f} |"
            assert any(line.startswith(start) for line in table), start


def find_ours(turn: int, seed: int, name: str) -> float:
    """Dice of the recipe that is compared, on one scan."""
    rows = read_json(ROOT / "benchmarks" / "results" / "levers.json")["rows"]
    wanted = ("laptop", 4.0, 4, turn, seed)
    keys = ("setting", "minutes", "patients", "round", "seed")
    return next(
        row["scans"][name]["dice"] for row in rows if tuple(row[key] for key in keys) == wanted
    )
