"""Set up .venv for the Makefile: the environment, PyTorch, this library.

A finished set-up leaves .venv/setup.json: what was asked for, and a digest of the files that settle what is installed.
A call that finds its own wishes there does nothing. While a set-up runs the file says that it is unfinished; the next
call then starts over, with the same wishes.
"""

import argparse
import hashlib
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
from dataclasses import asdict, dataclass, replace
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
    """What .venv holds, or was to hold."""

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
        if error.returncode > 0:
            return error.returncode  # pip has said why
        print(f"{error.cmd[2]}: ended by signal {-error.returncode}; is there memory enough?", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def set_up(asked: argparse.Namespace) -> None:
    """Bring .venv to what is asked; do nothing where it already is."""
    if asked.torch not in ("", "cpu", "keep"):
        raise SetupError(f"TORCH: must be cpu or keep; got {asked.torch!r}")
    found = read_state()
    torch = asked.torch or (found.torch if found else "cpu")
    wanted = Setup(
        finished=True,
        torch=torch,
        python=choose_python(asked, found, torch=torch),
        dev=asked.dev or bool(found and found.dev),
        root=str(ROOT),
        digest=digest(INPUTS),
    )
    kept = kept_torch(wanted.python) if torch == "keep" else None
    runs = installed(VENV / "bin/python", "nemotron-h") is not None
    if runs and found == wanted:
        return
    unfinished = replace(wanted, finished=False)
    if found and runs and found == replace(wanted, dev=found.dev, digest=found.digest):
        write_state(unfinished)
    else:
        create_environment(unfinished)
    constraints = CONSTRAINTS
    if kept is not None:
        version, folder = kept
        share_packages(folder)
        constraints = constrain_torch(version)
        print(f"PyTorch: {version}, kept from {folder}", flush=True)
    else:
        print(install_torch(VENV / "bin/python", cpu_index=asked.cpu_index, probe_seconds=asked.probe_seconds))
    print("Installing the library and what it needs: a minute or two", flush=True)
    install = [*pip_install(VENV / "bin/python"), "--quiet", "--constraint", str(constraints)]
    if wanted.dev and kept is not None:
        install_tools(install)
    target = f"{ROOT}[dev]" if wanted.dev else str(ROOT)
    subprocess.run([*install, "--editable", target], check=True)
    write_state(wanted)


def read_state() -> Setup | None:
    """What .venv holds or was to hold; None where nothing is known. A .venv of someone else's is refused."""
    folder = VENV.is_dir()
    if (folder and not STATE.exists() and any(VENV.iterdir())) or (not folder and os.path.lexists(VENV)):
        raise SetupError(".venv: must be one that make has made; found another; move it away or remove it")
    try:
        return Setup(**json.loads(STATE.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_state(state: Setup) -> None:
    """Replace the file whole: an interruption leaves the old one or the new one."""
    partial = STATE.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state)))
    partial.replace(STATE)


def choose_python(asked: argparse.Namespace, found: Setup | None, *, torch: str) -> str:
    """The interpreter asked for; where none is, the one .venv has, if it is still there.

    One whose PyTorch is kept is never replaced by another.
    """
    unasked = not asked.python and asked.torch != "keep"
    if found and unasked and found.torch == torch and (torch == "keep" or Path(found.python).exists()):
        return found.python
    return sys.executable if torch == "keep" else BASE_PYTHON


def digest(files: list[Path]) -> str:
    """One digest of the files' contents: times of change mean nothing after a checkout."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def create_environment(unfinished: Setup) -> None:
    """An empty .venv. Its state is there from the first moment, so an interruption forgets no wish."""
    code = "import sys; print('python{}.{}-venv'.format(*sys.version_info)); import ensurepip, venv"
    result = subprocess.run([unfinished.python, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        package = result.stdout.strip()
        raise SetupError(f"venv: missing from {unfinished.python}; install {package} (sudo apt install {package})")
    VENV.mkdir(exist_ok=True)
    write_state(unfinished)
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != STATE:
            path.unlink()
    subprocess.run([unfinished.python, "-m", "venv", str(VENV)], check=True)


def pip_install(python: Path) -> list[str]:
    """The beginning of every install."""
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check"]


def install_torch(python: Path, *, cpu_index: str, probe_seconds: float) -> str:
    """Install the CPU build of PyTorch where one can be had, else the plain one; return the line that says which.

    Linux wheels of the public package index carry gigabytes of CUDA libraries, so the plain one comes last.
    """
    version = pinned_version("torch")
    present = installed(python, "torch")
    if present is not None and present[0].split("+")[0] == version:
        return f"PyTorch: {present[0]}, already in .venv"
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


def installed(python: Path, package: str) -> tuple[str, Path] | None:
    """Version and folder of a package in an environment, without importing it.

    None where it is not installed, or the interpreter does not run.
    """
    code = f"import importlib.metadata as m; found = m.distribution({package!r}); print(found.version)"
    command = [str(python), "-c", f"{code}; print(found.locate_file('').resolve())"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version, folder = result.stdout.splitlines()
    return version, Path(folder)


def try_install(python: Path, *arguments: str) -> bool:
    """Install one wheel without its dependencies; False where it cannot be had, said unless it does not exist."""
    # without the constraints: pip would call a build that does not exist a conflict with them
    command = [*pip_install(python), "--no-deps", *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode and "No matching distribution" not in result.stderr:
        lines = result.stderr.strip().splitlines() or [f"pip ended with code {result.returncode}"]
        print(f"{arguments[-1]}: {lines[-1]}", file=sys.stderr, flush=True)
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


def kept_torch(python: str) -> tuple[str, Path]:
    """Version and folder of an interpreter's PyTorch, refused outside the range of pyproject.toml."""
    if Path(python).parent.parent.resolve() == VENV.resolve():
        raise SetupError("TORCH=keep: the active environment must not be .venv itself; run deactivate first")
    wanted = next(line for line in project()["dependencies"] if re.match(r"torch\b", line))
    low, high = (release(bound) for bound in re.findall(r"[<>]=?([\d.]+)", wanted))
    found = installed(Path(python), "torch")
    if found is None:
        raise SetupError(f"TORCH=keep: needs {wanted}; {python} has none; TORCH=cpu installs one")
    if not low <= release(found[0]) < high:
        raise SetupError(f"TORCH=keep: needs {wanted}; {python} has {found[0]}; TORCH=cpu installs one")
    return found


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


def constrain_torch(version: str) -> Path:
    """The constraints with the PyTorch that is kept, or pip would put the pinned one before it."""
    file = VENV / CONSTRAINTS.name
    file.write_text(re.sub("^torch==.*", f"torch=={version}", CONSTRAINTS.read_text(), flags=re.MULTILINE))
    return file


def install_tools(install: list[str]) -> None:
    """Give .venv development tools of its own: of those it sees elsewhere, the commands are elsewhere too."""
    own = {re.sub("[_.]", "-", found.name.lower()) for found in metadata.distributions(path=[str(site_packages())])}
    tools = project()["optional-dependencies"]["dev"]
    missing = [line for line in tools if re.split("[^a-z0-9-]", line)[0] not in own]
    if missing:
        subprocess.run([*install, "--no-deps", "--ignore-installed", *missing], check=True)


if __name__ == "__main__":
    sys.exit(main())
