"""Every Python block of the README and of the pages runs, and every example: what a reader copies works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], check=False, cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_blocks_run(page: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("no python block on this page")
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    done = run(["-W", "error", "page.py"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / example
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    done = run(["-W", "error", str(path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_example_tells_where_its_checkpoint_is_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("temporary", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    done = run([str(ROOT / "examples" / "train_and_write.py")], tmp_path / "here")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("checkpoint: ")]
    assert (tmp_path / "here" / line.removeprefix("checkpoint: ") / "model.safetensors").exists()
    assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()] == []


def test_every_room_has_a_page() -> None:
    rooms = {path.parent.name for path in (ROOT / "src" / "nemotron_h").glob("*/__init__.py")}
    assert rooms - {Path(page).stem for page in PAGES} == set()


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_tests_that_a_page_names_exist(page: str) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+(?:\.py)?/?)(?:::(\w+))?`", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
        if name:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
