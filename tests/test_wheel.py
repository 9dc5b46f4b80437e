"""The wheel, built by way of the source distribution, in an environment that has never seen the checkout."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nemotron_h
from nemotron_h.config.presets import preset

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/nemotron_h"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], check=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and the libraries that it names, PyTorch by the way of `make install`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH")  # installing asks the package index: the one thing in the tests that does
        install_torch(folder / "env/bin/python")
    run(folder, "python", "-m", "pip", "install", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    return folder


def install_torch(python: Path) -> None:
    """Call the function of scripts/install.py with what the Makefile gives it."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts/install.py")
    assert spec is not None and spec.loader is not None
    install = importlib.util.module_from_spec(spec)
    sys.modules["install"] = install  # where its dataclass looks itself up
    spec.loader.exec_module(install)
    default = dict(re.findall(r"^(\w+) \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    install.install_torch(python, cpu_index=default["CPU_INDEX"], probe_seconds=float(default["PROBE_SECONDS"]))


def run(environment: Path, *command: str) -> str:
    """What a command of the environment prints, away from the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [environment / "env/bin" / command[0], *command[1:]],
        cwd=environment,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == wanted
    assert "nemotron_h/py.typed" in names
    assert "nemotron_h/recipes/laptop.toml" in names


def test_the_package_is_the_installed_one(environment: Path) -> None:
    printed = run(environment, "python", "-c", "import nemotron_h; print(nemotron_h.__file__)")
    assert Path(printed.strip()).is_relative_to(environment)


def test_version(environment: Path) -> None:
    assert nemotron_h.__version__ in run(environment, "nemotron-h", "--version")


def test_show(environment: Path) -> None:
    assert "8b" in run(environment, "nemotron-h", "show", "8b")
    shown = json.loads(run(environment, "nemotron-h", "show", "8b", "--json"))
    assert shown["pattern"] == preset("8b").pattern


def test_twenty_steps(environment: Path) -> None:
    run(environment, "nemotron-h", "run", "laptop", "train.steps=20")
    assert any((environment / "runs").rglob("*.safetensors"))
