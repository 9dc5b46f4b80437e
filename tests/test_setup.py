"""The Makefile's set-up, on a toy checkout with wheels of a few bytes and package indexes on this machine alone."""

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# A build backend without requirements: an editable install that asks no package index for anything but PyTorch.
BACKEND = """
import pathlib, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "nemotron_h-1-py3-none-any.whl"
    info = "nemotron_h-1.dist-info"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("nemotron_h.pth", str(pathlib.Path.cwd()))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: nemotron-h\\nVersion: 1\\n"
                       "Requires-Dist: torch>=2.13,<2.14\\nProvides-Extra: dev\\n"
                       "Requires-Dist: tool>=1; extra == 'dev'\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\\nnemotron-h = toy:main\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "nemotron-h"
version = "1"
dependencies = ["torch>=2.13,<2.14"]
optional-dependencies = { dev = ["tool>=1"] }
"""
TOY = """
import sys, torch

def main():
    print("the toy ran", *sys.argv[1:], "with torch", torch.__version__)
"""


@pytest.fixture(scope="module")
def install() -> ModuleType:
    """scripts/install.py as a module."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts/install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip alone, to be copied."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


@pytest.fixture
def environment(bare: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "env", symlinks=True))


@pytest.fixture
def checkout(tmp_path: Path, install: ModuleType) -> Path:
    """The Makefile and its script around a package of one line."""
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "scripts/install.py", folder / "scripts")
    (folder / "constraints.txt").write_text(f"torch=={install.pinned_version('torch')}\n")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "toy.py").write_text(TOY)
    return folder


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Index:
    """A package index on this machine, by the simple interface."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def add(self, package: str, version: str) -> Path:
        folder = self.folder / package
        folder.mkdir(exist_ok=True)
        wheel = write_wheel(folder, package, version)
        names = [path.name.replace("+", "%2B") for path in folder.glob("*.whl")]
        (folder / "index.html").write_text("".join(f'<a href="{name}">{name}</a>' for name in names))
        return wheel

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def write_wheel(folder: Path, package: str, version: str) -> Path:
    """A package that knows its version, and a command of its name."""
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{package}/__init__.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{package} = {package}:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def unpack(wheel: Path, environment: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(environment / SITE)


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The package index that pip is configured with. Nothing of the tester's own settings remains."""
    for name in [*os.environ]:
        if name.upper().startswith(("PIP_", "MAKE", "MFLAGS")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    for name in ("TORCH", "PYTHON", "CPU_INDEX", "PROBE_SECONDS", "PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    index = Index(tmp_path / "configured")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield index
    index.close()


@pytest.fixture
def cpu_index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "cpu")
    yield index
    index.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def make(checkout: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} if path else None
    command = ["make", "--no-print-directory", "-C", str(checkout), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal, before make's own."""
    line, last = result.stderr.splitlines()
    assert last.startswith("make: ***")
    assert result.stdout == ""
    return line


def test_the_cpu_build_of_the_configured_index_comes_first(
    install: ModuleType, environment: Path, configured: Index, cpu_index: Index
) -> None:
    version = install.pinned_version("torch")
    configured.add("torch", version)
    configured.add("torch", f"{version}+cpu")
    cpu_index.add("torch", f"{version}+cpu")
    line = install.install_torch(environment / "bin/python", cpu_index=cpu_index.url, probe_seconds=2)
    assert line == f"PyTorch: {version}+cpu, the CPU build of the configured package index"
    assert install.installed(environment / "bin/python", "torch")[0] == f"{version}+cpu"

    line = install.install_torch(environment / "bin/python", cpu_index=cpu_index.url, probe_seconds=2)
    assert line == f"PyTorch: {version}+cpu, already in .venv"


def test_the_cpu_index_comes_second(
    install: ModuleType, environment: Path, configured: Index, cpu_index: Index, capfd: pytest.CaptureFixture[str]
) -> None:
    version = install.pinned_version("torch")
    configured.add("torch", version)
    cpu_index.add("torch", f"{version}+cpu")
    line = install.install_torch(environment / "bin/python", cpu_index=cpu_index.url, probe_seconds=2)
    assert line == f"PyTorch: {version}+cpu, the CPU build of {cpu_index.url}"
    printed = capfd.readouterr()
    assert printed.err == ""  # what the first index lacks is no error
    assert "ERROR" not in printed.out
    assert install.installed(environment / "bin/python", "torch")[0] == f"{version}+cpu"


def test_without_an_answer_the_plain_build_is_taken(
    install: ModuleType, environment: Path, configured: Index, silent: str
) -> None:
    version = install.pinned_version("torch")
    configured.add("torch", version)
    line = install.install_torch(environment / "bin/python", cpu_index=silent, probe_seconds=0.5)
    assert line.startswith(f"PyTorch: {version}, the default build")
    assert f"no answer from {silent} within 0.5 seconds" in line
    assert install.installed(environment / "bin/python", "torch")[0] == version


def test_a_cpu_index_without_this_version_is_said(
    install: ModuleType, environment: Path, configured: Index, cpu_index: Index
) -> None:
    version = install.pinned_version("torch")
    configured.add("torch", version)
    cpu_index.add("torch", "1.0.0+cpu")
    line = install.install_torch(environment / "bin/python", cpu_index=cpu_index.url, probe_seconds=2)
    assert f"{cpu_index.url} gave no CPU build for this machine" in line
    assert install.installed(environment / "bin/python", "torch")[0] == version


def test_a_failed_download_is_said(
    install: ModuleType, environment: Path, configured: Index, cpu_index: Index, capfd: pytest.CaptureFixture[str]
) -> None:
    version = install.pinned_version("torch")
    configured.add("torch", version)
    cpu_index.add("torch", f"{version}+cpu").write_bytes(b"not a wheel")
    line = install.install_torch(environment / "bin/python", cpu_index=cpu_index.url, probe_seconds=2)
    assert "gave no CPU build" in line
    assert f"torch=={version}+cpu: ERROR: Wheel" in capfd.readouterr().err


def test_a_killed_pip_is_said(install: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_script(tmp_path / "bin/python", "kill -9 $$")
    assert not install.try_install(tmp_path / "bin/python", "torch==2")
    assert capfd.readouterr().err == "torch==2: pip ended with code -9\n"


@pytest.mark.usefixtures("configured")
def test_the_probe_keeps_its_time(install: ModuleType, silent: str) -> None:
    start = time.monotonic()
    assert not install.answers(silent, seconds=2)
    assert 1.5 < time.monotonic() - start < 4


@pytest.mark.usefixtures("configured")
def test_the_probe_keeps_its_time_where_looking_up_the_name_hangs(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> None:
        over.wait(30)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert not install.answers("http://index.invalid/torch/", seconds=0.2)
    assert time.monotonic() - start < 2
    over.set()


def test_the_probe_goes_through_the_proxy(
    install: ModuleType, configured: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}/torch/"
    assert not install.answers(closed, seconds=2)
    monkeypatch.setenv("http_proxy", configured.url)
    monkeypatch.setattr(urllib.request, "_opener", None)  # remembers the proxies of the first call
    assert install.answers(closed, seconds=2)


def test_set_up_once(checkout: Path, install: ModuleType, configured: Index, silent: str, tmp_path: Path) -> None:
    version = install.pinned_version("torch")
    configured.add("torch", f"{version}+cpu")
    stubs = tmp_path / "stubs"
    write_script(stubs / "python3.11", "exit 127")  # on PATH, but does not run
    write_script(stubs / "python3.12", f'exec {sys.executable} "$@"')
    asked = ["run", f"CPU_INDEX={silent}"]
    first = make(checkout, *asked, path=stubs)
    assert first.returncode == 0, first.stderr
    assert f"PyTorch: {version}+cpu, the CPU build of the configured package index\n" in first.stdout
    assert first.stdout.endswith(f"the toy ran run laptop with torch {version}+cpu\n")

    configured.add("tool", "1.0")
    assert "Installing" in make(checkout, "install-dev", path=stubs).stdout
    assert (checkout / ".venv/bin/tool").exists()

    before = snapshot(checkout)
    configured.close()  # whoever asks the index now fails
    durations = []
    for target in ("install-dev", "install-dev", "install"):  # the fastest of three: others may be using the machine
        start = time.monotonic()
        again = make(checkout, target, f"CPU_INDEX={silent}", path=stubs)
        durations.append(time.monotonic() - start)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert min(durations) < 1
    assert snapshot(checkout) == before

    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        with (checkout / name).open("a") as file:
            file.write("\n# changed\n")
        changed = make(checkout, "install", f"CPU_INDEX={silent}", path=stubs)
        assert changed.returncode == 0, changed.stderr
        assert f"PyTorch: {version}+cpu, already in .venv\n" in changed.stdout


def test_an_interrupted_set_up_starts_over(checkout: Path, install: ModuleType, configured: Index, silent: str) -> None:
    version = install.pinned_version("torch")
    command = ["make", "-C", str(checkout), "install", f"CPU_INDEX={silent}", "PROBE_SECONDS=60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    state = checkout / ".venv/setup.json"
    wait_for(lambda: state.exists() and "finished" in state.read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert json.loads(state.read_text())["finished"] is False
    leftover = checkout / ".venv/leftover"
    leftover.touch()

    configured.add("torch", f"{version}+cpu")
    result = make(checkout, "install")
    assert result.returncode == 0, result.stderr
    assert "the CPU build" in result.stdout
    assert not leftover.exists()
    assert json.loads(state.read_text())["finished"] is True


@pytest.mark.slow
def test_a_set_up_without_its_interpreter_starts_over(checkout: Path, install: ModuleType, configured: Index) -> None:
    configured.add("torch", f"{install.pinned_version('torch')}+cpu")
    assert make(checkout, "install").returncode == 0
    state = checkout / ".venv/setup.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "python": "/gone/python3.11"}))
    for python in (checkout / ".venv/bin").glob("python*"):
        python.unlink()
    (checkout / ".venv/bin/python").symlink_to("/gone/python3.11")
    result = make(checkout, "run")
    assert result.returncode == 0, result.stderr
    assert "the toy ran" in result.stdout


@pytest.mark.slow
def test_an_interruption_forgets_no_wish(checkout: Path, environment: Path, configured: Index, tmp_path: Path) -> None:
    configured.add("torch", "2.13.0+cpu")
    unpack(write_wheel(tmp_path, "torch", "2.13.1"), environment)
    assert make(checkout, "install-dev", "TORCH=keep", path=environment / "bin").returncode  # the index has no tool
    configured.add("tool", "1.0")
    result = make(checkout, "install")
    assert result.returncode == 0, result.stderr
    assert f"PyTorch: 2.13.1, kept from {environment / SITE}\n" in result.stdout
    assert not (checkout / ".venv" / SITE / "torch").exists()
    assert (checkout / ".venv/bin/tool").exists()


@pytest.mark.parametrize("version", ["2.13.0+mine", pytest.param("2.13.1", marks=pytest.mark.slow)])
def test_torch_kept(
    checkout: Path, environment: Path, install: ModuleType, configured: Index, tmp_path: Path, version: str
) -> None:
    configured.add("torch", install.pinned_version("torch"))
    unpack(write_wheel(tmp_path, "torch", version), environment)
    result = make(checkout, "run", "TORCH=keep", path=environment / "bin")
    assert result.returncode == 0, result.stderr
    assert f"PyTorch: {version}, kept from {environment / SITE}\n" in result.stdout
    assert result.stdout.endswith(f"the toy ran run laptop with torch {version}\n")
    assert not (checkout / ".venv" / SITE / "torch").exists()
    assert make(checkout, "install", "TORCH=keep", path=environment / "bin").stdout == ""
    assert make(checkout, "install").stdout == ""  # no wish is no wish for another

    # A tool that the active environment has too needs its command here.
    unpack(configured.add("tool", "1.0"), environment)
    assert make(checkout, "install-dev").returncode == 0
    assert (checkout / ".venv/bin/tool").exists()
    assert not (checkout / ".venv" / SITE / "torch").exists()
    line = refusal(make(checkout, "install", "TORCH=keep", path=checkout / ".venv/bin"))
    assert line == "TORCH=keep: the active environment must not be .venv itself; run deactivate first"


@pytest.mark.usefixtures("configured")
def test_torch_cannot_be_kept(checkout: Path, environment: Path, tmp_path: Path) -> None:
    line = refusal(make(checkout, "install", "TORCH=keep", path=environment / "bin"))
    assert line == f"TORCH=keep: needs torch>=2.13,<2.14; {environment}/bin/python has none; TORCH=cpu installs one"
    for version in ("2.12.1", "2.14.0"):
        unpack(write_wheel(tmp_path, "torch", version), environment)
        line = refusal(make(checkout, "install", "TORCH=keep", path=environment / "bin"))
        assert f"has {version}; TORCH=cpu installs one" in line
        shutil.rmtree(environment / SITE / f"torch-{version}.dist-info")
    assert "TORCH: must be cpu or keep; got 'kept'" in refusal(make(checkout, "install", "TORCH=kept"))
    assert not (checkout / ".venv").exists()


@pytest.mark.usefixtures("configured")
def test_python_without_venv(
    checkout: Path, install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    line = refusal(make(checkout, "install", f"PYTHON={sys.executable}"))
    assert line == f"venv: missing from {install.BASE_PYTHON}; install {package} (sudo apt install {package})"


@pytest.mark.usefixtures("configured")
def test_python_too_old(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 10, 14, 'final', 0)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = refusal(make(checkout, "install"))
    assert line.startswith("python: 3.11 or newer is needed; found none among: python3.11 python3.12")
    assert line.endswith("install python3.11 and python3.11-venv")


@pytest.mark.usefixtures("configured")
def test_the_venv_of_someone_else_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv/bin").mkdir(parents=True)
    assert refusal(make(checkout, "install")).startswith(".venv: must be one that make has made")
    assert (checkout / ".venv/bin").exists()


@pytest.mark.usefixtures("configured")
def test_a_file_and_a_link_to_nowhere_are_no_venv(checkout: Path) -> None:
    (checkout / ".venv").symlink_to("/gone/.venv")
    assert refusal(make(checkout, "install")).startswith(".venv: must be one that make has made")
    (checkout / ".venv").unlink()
    (checkout / ".venv").touch()
    assert refusal(make(checkout, "install")).startswith(".venv: must be one that make has made")


@pytest.mark.usefixtures("configured")
def test_a_file_that_cannot_be_written_is_said_in_one_line(checkout: Path) -> None:
    (checkout / ".venv/setup.partial").mkdir(parents=True)
    (checkout / ".venv/setup.json").write_text("{}")
    line = refusal(make(checkout, "install"))
    assert line == f"set-up: [Errno 21] Is a directory: '{checkout}/.venv/setup.partial'"


def test_a_killed_install_is_said_in_one_line(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def killed(_: object) -> None:
        raise subprocess.CalledProcessError(-9, ["python", "-m", "pip", "install"])

    monkeypatch.setattr(install, "set_up", killed)
    monkeypatch.setattr(sys, "argv", ["install.py", "--cpu-index", "", "--probe-seconds", "2"])
    assert install.main() == 2
    assert capfd.readouterr().err == "pip: ended by signal 9; is there memory enough?\n"


def test_the_checks_without_make(tmp_path: Path) -> None:
    result = subprocess.run(
        ["/bin/sh", ROOT / ".ci/run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "make: not found on PATH; install it (sudo apt install make)\n"


def test_every_dependency_is_imported(install: ModuleType) -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    modules = {"pyyaml": "yaml"}  # what is imported, where it is called otherwise
    given = [re.split("[<>=]", line)[0] for line in install.project()["dependencies"]]
    names = [modules.get(name, name) for name in given]
    assert [name for name in names if not re.search(rf"^ *(import|from) {name}\b", source, re.MULTILINE)] == []


def test_every_dependency_and_tool_is_pinned(install: ModuleType) -> None:
    project = install.project()
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = re.split("[<>=]", line)[0]
        assert f"\n{name}=={install.pinned_version(name)}\n" in f"\n{(ROOT / 'constraints.txt').read_text()}"


def write_script(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def snapshot(folder: Path) -> dict[str, int]:
    """Every file and when it changed."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
