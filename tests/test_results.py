"""Every number that was measured comes from a file in benchmarks/results, with the command and machine that gave it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.evaluate.rows import row
from tests.benchmarks import ROOT, script

FILES = sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
STATED = re.compile(r".*<!-- stated: .+ -->.*\n?")  # a line whose number is a setting, a definition or a test's bound
MEASURED = re.compile(
    r"\d[\d,.]*\s*(?:tokens/s|tok/s|steps/s|[GMT]B/s|[GT]FLOP/s|[KMG]i?B\b|ms\b|s\b|seconds|minutes|hours"
    r"|times (?:faster|slower|as fast|as slow)|x faster|bits per byte|%)"
)


results = script("results")


def unfounded(text: str) -> list[str]:
    """Lines with a measured number that is in no table made from a file."""
    bare = STATED.sub("\n", results.BLOCK.sub("", FENCE.sub("", text)))
    return [line for line in bare.splitlines() if MEASURED.search(line)]


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in results.pages()])
def test_pages_hold_no_number_that_no_result_holds(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert unfounded(text) == []
    assert results.rendered(text) == text, "run python benchmarks/results.py"


@pytest.mark.parametrize("file", FILES)
def test_a_results_file_says_what_gave_it(file: str) -> None:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    for key in ("command", "commit", "date", "cpu", "cpu_features", "threads", "torch", "python", "rows"):
        assert content[key], key
    assert re.fullmatch("[0-9a-f]{7,40}", content["commit"]), "measure what is checked in"
    for own in content["rows"]:
        assert set(own) == {"what", "unit", "ours", "peer", "peer_version", "ratio", "n", "spread", "roof"}
        assert (own["peer"] is None) == (own["peer_version"] is None) == (own["ratio"] is None)
        if own["ratio"] is not None:
            quotient = own["ours"] / own["peer"]
            assert own["ratio"] == pytest.approx(quotient) or own["ratio"] == pytest.approx(1 / quotient)


def test_a_number_without_a_file_is_found() -> None:
    assert unfounded("It decodes 57 tokens/s.\nThree layers.\n") == ["It decodes 57 tokens/s."]
    assert unfounded("Loads in 3.5 s and is 12 % smaller.") != []
    assert unfounded("Blocks of 256 tokens, 64 places, 8 heads, 4.5 bits a weight; step 12.") == []
    assert unfounded("```\nloss 3.1, 5 tokens/s\n```\n") == []
    assert unfounded("At most 240 s. <!-- stated: a recipe's limit -->\n") == []
    assert unfounded("<!-- results x -->\n| 57 tokens/s |\n<!-- end -->\n") == []


def test_one_run_is_said_to_be_one() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / FILES[0]).read_text())
    one, many = row("a", "MiB", [100], higher=False), row("b", "MiB", [100, 110], higher=False)
    both = results.table(content | {"rows": [vars(one), vars(many)]})
    assert "| a, MiB | 100 | one run |" in both
    assert "| b, MiB | 105 | 10 % |" in both
    assert "Medians of 2 runs; " in both  # nobody else's, to take turns with
    assert "One run each; " in results.table(content | {"rows": [vars(one)]})
    against = row("c", "MiB", [100, 110], [90, 95], "peer 1", higher=False)
    assert "Medians of 2 runs that took turns; " in results.table(content | {"rows": [vars(one), vars(against)]})


def test_the_best_peer_stands_beside_ours_and_the_others_behind_it() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / FILES[0]).read_text())
    slow = row("a", "tokens/s", [100, 110], [10, 10], "slow 1", higher=True)
    fast = row("a", "tokens/s", [100, 110], [50, 80], "fast 2", higher=True)
    alone = row("b", "of 1", [0.5], higher=True)
    lines = results.table(content | {"rows": [vars(slow), vars(fast), vars(alone)]}).splitlines()
    assert lines[0] == "|  | ours | best peer | ratio | others: ratio | spread |"
    assert lines[2] == "| a, tokens/s | 105 | fast 2: 65 | 1.62 | slow 1: 10.5 | 46 % |"
    assert lines[3] == "| b, of 1 | 0.5 |  |  |  | one run |"
    one = results.table(content | {"rows": [vars(slow), vars(alone)]}).splitlines()
    assert one[0] == "|  | ours | slow 1 | ratio | spread |"
    each = results.table(content | {"rows": [vars(slow), vars(fast) | {"what": "c"}]}).splitlines()
    assert each[0] == "|  | ours | peer | ratio | spread |"
    assert each[2] == "| a, tokens/s | 105 | slow 1: 10 | 10.5 | 10 % |"


def test_parts_stand_beside_their_whole() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / FILES[0]).read_text())
    wholes = [row("a", "ms", [100, 110], higher=False), row("b", "ms", [7], higher=False)]
    parts = [
        row(what, results.PART, [share], higher=False) for what, share in (("a: x", 61.2), ("a: y", 38), ("b: y", 9))
    ]
    lines = results.table(content | {"rows": [vars(one) for one in (*wholes, *parts)]}).splitlines()
    assert lines[0] == "|  | all | x | y | spread |"
    assert lines[2:4] == ["| a | 105 ms | 61 % | 38 % | 10 % |", "| b | 7 ms |  | 9 % | one run |"]


def test_a_command_is_told_without_where_this_machine_keeps_things() -> None:
    line = [
        "/work/clone/benchmarks/race.py",
        "--cache",
        "/tmp/cache",
        "--llama",
        "/home/me/llama/bin/python",
        "--n",
        "3",
    ]
    assert results.stated(line) == "python benchmarks/race.py --llama llama/bin/python --n 3"
    assert results.stated(["benchmarks/loss.py", "/home/me/runs/laptop"]) == "python benchmarks/loss.py runs/laptop"


def test_a_race_goes_on_with_what_was_measured_on_the_same_basis_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    basis = {"sources": "abc", "n": 5, "peers": ["llama"]}
    rows = [row("a", "tokens/s", [2.0], [1.0], "peer 1", higher=True, roof=4.0)]
    assert results.measured("race", basis) == ([], {})
    results.write("race", rows, "1234567", basis=basis, absent={"vllm": "no Python"})
    assert results.measured("race", basis) == (rows, {"vllm": "no Python"})
    for other in ({"sources": "abd"}, {"n": 3}, {"peers": []}, {"sources": None}):
        assert results.measured("race", basis | other) == ([], {})
    results.write("race", rows, "1234567", basis=basis | {"sources": None})  # what is not checked in may have changed
    assert results.measured("race", basis | {"sources": None}) == ([], {})


def test_who_is_not_in_a_table_is_named_under_it(tmp_path: Path) -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / FILES[0]).read_text())
    rows = [vars(row("a", "tokens/s", [2.0], higher=True, roof=4.0))]
    lines = results.table(content | {"rows": rows, "absent": {"a": "gone", "b": "gone", "c": "none"}}).splitlines()
    assert lines[0] == "|  | ours | of the roof | spread |"
    assert lines[2] == "| a, tokens/s | 2 | 50 % | one run |"
    assert lines[-1] == "Not in it: a; b: gone. c: none."


def test_a_race_says_what_its_formats_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    entries = []
    for precision, kind, loss, bits in (
        ("bfloat16", "bf16", (2.0, 2.0), (16, 16)),
        ("int4", "q4_0", (2.1, 2.2), (4, 5)),
    ):
        entries.append(row(f"{precision}, loss of 4 windows", "nats", *([v] for v in loss), f"x {kind}", higher=False))
        entries.append(row(f"{precision}, bits per weight", "bits", *([v] for v in bits), f"x {kind}", higher=False))
    (tmp_path / "loss.json").write_text(json.dumps({"rows": [vars(entry) for entry in entries]}))
    said = results.cost_of_formats([{"what": "256 M, int4, prompt"}])
    assert said.endswith(": int4 ours 4 bits, +5.00 %; int4 q4_0 5 bits, +10.00 %.")


def test_the_commit_is_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("src/a.py", "benchmarks/b.py", "benchmarks/results/c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results/c.json").write_text("2")  # by the part before
    clean, measured = results.commit(), results.sources()
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    git("add", ".")
    git("commit", "-m", "results")
    assert (clean, measured) != (results.commit(), None)
    assert results.sources() == measured  # results are no source
    clean = results.commit()
    for name in ("src/a.py", "benchmarks/b.py"):
        (tmp_path / name).write_text("2")
        assert results.commit() == f"{clean}-dirty"
        assert results.sources() is None
        (tmp_path / name).write_text("1")
