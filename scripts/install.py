"""Set up .venv for the Makefile: the environment, PyTorch, this library.

A finished set-up leaves .venv/setup.json: what was asked for, and a digest of the files that settle what is installed.
A call that finds its own wishes there does nothing. While a set-up runs the file says that it is unfinished; the next
call then starts over.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = VENV / "setup.json"
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = [ROOT / "pyproject.toml", CONSTRAINTS, ROOT / "Makefile", Path(__file__).resolve()]

# Outside a virtual environment these two are the same; inside, .venv must not hang on an environment that may go away.
BASE_PYTHON = str(getattr(sys, "_base_executable", sys.executable))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What .venv holds."""

    finished: bool
    torch: str  # "cpu" or "keep"
    python: str  # the interpreter it was made from; with "keep", the one whose PyTorch it uses
    dev: bool  # the development tools too
    root: str  # scripts in .venv name this folder, so a moved checkout is set up again
    digest: str


class SetupError(Exception):
    """What, the rule, the value found, what to do: printed as one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv.")
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--python", default="", help="empty: any will do")
    parser.add_argument("--torch", default="", help="cpu or keep; empty: as it is, or cpu")
    parser.add_argument("--cpu-index", required=True)
    parser.add_argument("--probe-seconds", type=float, required=True)
    asked = parser.parse_args()
    try:
        set_up(asked)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode  # pip has said why
    except KeyboardInterrupt:
        return 130
    return 0


def set_up(asked: argparse.Namespace) -> None:
    """Bring .venv to what is asked; do nothing where it already is."""
    if asked.torch not in ("", "cpu", "keep"):
        raise SetupError(f"TORCH: must be cpu or keep; got {asked.torch!r}")
    found = read_state()
    wanted = Setup(
        finished=True,
        torch=asked.torch or (found.torch if found else "cpu"),
        python=choose_python(asked, found),
        dev=asked.dev or bool(found and found.dev),
        root=str(ROOT),
        digest=digest(INPUTS),
    )
    kept = active_torch() if asked.torch == "keep" else None
    if found == wanted:
        return
    if found is None or (found.torch, found.python) != (wanted.torch, wanted.python):
        create_environment()
    write_state(Setup(**{**asdict(wanted), "finished": False}))
    if kept is not None:
        version, folder = kept
        share_packages(folder)
        print(f"PyTorch: {version}, kept from {folder}", flush=True)
    elif wanted.torch == "cpu":
        print(install_torch(VENV / "bin/python", cpu_index=asked.cpu_index, probe_seconds=asked.probe_seconds))
    print("Installing the library and what it needs: a minute or two", flush=True)
    if wanted.dev and wanted.torch == "keep":
        install_tools()
    target = f"{ROOT}[dev]" if wanted.dev else str(ROOT)
    subprocess.run([*pip_install(VENV / "bin/python"), "--quiet", "--editable", target], check=True)
    write_state(wanted)


def read_state() -> Setup | None:
    """What .venv holds; None where there is nothing to build upon. A .venv of someone else's is refused."""
    if VENV.exists() and not STATE.exists() and any(VENV.iterdir()):
        raise SetupError(".venv: must be one that make has made; found another; move it away or remove it")
    try:
        state = Setup(**json.loads(STATE.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return state if state.finished and state.root == str(ROOT) else None


def write_state(state: Setup) -> None:
    """Replace the file whole: an interruption leaves the old one or the new one."""
    partial = STATE.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state)))
    partial.replace(STATE)


def choose_python(asked: argparse.Namespace, found: Setup | None) -> str:
    """The interpreter asked for; where none is, the one .venv has."""
    if asked.torch == "keep":
        return sys.executable
    if found and not asked.python and not (asked.torch and asked.torch != found.torch):
        return found.python
    return BASE_PYTHON


def digest(files: list[Path]) -> str:
    """One digest of the files' contents: times of change mean nothing after a checkout."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def create_environment() -> None:
    """An empty .venv, marked as unfinished from its first moment."""
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        raise SetupError(f"venv: missing from {sys.executable}; install {package} (sudo apt install {package})")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    STATE.write_text("{}")
    subprocess.run([BASE_PYTHON, "-m", "venv", str(VENV)], check=True)


def pip_install(python: Path) -> list[str]:
    """The beginning of every install: nothing gets past the constraints."""
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]


def install_torch(python: Path, *, cpu_index: str, probe_seconds: float) -> str:
    """Install the CPU build of PyTorch where one can be had, else the plain one; return the line that says which.

    Linux wheels of the public package index carry gigabytes of CUDA libraries, so the plain one comes last.
    """
    version = pinned_version("torch")
    present = installed_version(python, "torch")
    if present is not None and present.split("+")[0] == version:
        return f"PyTorch: {present}, already in .venv"
    build = f"torch=={version}+cpu"
    if try_install(python, build):
        return f"PyTorch: {version}+cpu, the CPU build of the configured package index"
    if not answers(f"{cpu_index.rstrip('/')}/torch/", seconds=probe_seconds):
        reason = f"no answer from {cpu_index} within {probe_seconds:g} seconds"
    elif try_install(python, "--index-url", cpu_index, build):
        return f"PyTorch: {version}+cpu, the CPU build of {cpu_index}"
    else:
        reason = f"{cpu_index} gave no CPU build for this machine"
    line = f"PyTorch: {version}, the default build of the configured package index ({reason})"
    subprocess.run([*pip_install(python), "--no-deps", f"torch=={version}"], check=True)
    return line


def pinned_version(package: str) -> str:
    """The version that constraints.txt pins."""
    match = re.search(rf"^{package}==(\S+)", CONSTRAINTS.read_text(), flags=re.MULTILINE)
    if match is None:
        raise SetupError(f"constraints.txt: must pin {package}==VERSION; found no such line")
    return match[1]


def installed_version(python: Path, package: str) -> str | None:
    """The version in an environment, without importing the package; None where it is not installed."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def try_install(python: Path, *arguments: str) -> bool:
    """Install one wheel without its dependencies; False where it cannot be had, said unless it does not exist."""
    command = [*pip_install(python), "--no-deps", *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode and "No matching distribution" not in result.stderr:
        print(f"{arguments[-1]}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
    return result.returncode == 0


def answers(url: str, *, seconds: float) -> bool:
    """Whether a server answers at url in time, through the environment's proxies.

    In a thread, because looking up a name obeys no timeout.
    """
    replies: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds):
                replies.append(True)
        except urllib.error.HTTPError as error:
            error.close()
            replies.append(True)
        except urllib.error.URLError as error:
            # A certificate unknown here may be known to pip, which brings its own.
            replies.append(isinstance(error.reason, ssl.SSLCertVerificationError))
        except (OSError, ValueError):
            replies.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return replies == [True]


def active_torch() -> tuple[str, Path]:
    """Version and folder of the active environment's PyTorch, refused outside the range of pyproject.toml."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise SetupError("TORCH=keep: the active environment must not be .venv itself; run deactivate first")
    wanted = next(line for line in project()["dependencies"] if re.match(r"torch\b", line))
    low, high = (release(bound) for bound in re.findall(r"[<>]=?([\d.]+)", wanted))
    try:
        found = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        raise SetupError(f"TORCH=keep: needs {wanted}; {sys.executable} has none; leave TORCH out") from None
    if not low <= release(found.version) < high:
        raise SetupError(f"TORCH=keep: needs {wanted}; {sys.executable} has {found.version}; leave TORCH out")
    return found.version, Path(str(found.locate_file(""))).resolve()


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def project() -> dict[str, Any]:
    """The project's table in pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def site_packages() -> Path:
    """Where .venv keeps its own packages."""
    [folder] = VENV.glob("lib/python*/site-packages")
    return folder


def share_packages(folder: Path) -> None:
    """Let .venv see the packages of folder, after its own.

    A .venv made with --system-site-packages would see those of the base interpreter, not of an active environment.
    """
    line = f"import site; site.addsitedir({os.fspath(folder)!r})\n"
    (site_packages() / "kept_torch.pth").write_text(line)


def install_tools() -> None:
    """Give .venv development tools of its own: of those it sees elsewhere, the commands are elsewhere too."""
    own = {re.sub("[_.]", "-", found.name.lower()) for found in metadata.distributions(path=[str(site_packages())])}
    tools = project()["optional-dependencies"]["dev"]
    missing = [line for line in tools if re.split("[^a-z0-9-]", line)[0] not in own]
    if missing:
        alone = ["--quiet", "--no-deps", "--ignore-installed"]
        subprocess.run([*pip_install(VENV / "bin/python"), *alone, *missing], check=True)


if __name__ == "__main__":
    sys.exit(main())
