"""What every test shares: no network, hypothesis that draws the same examples each time, threads that are put back."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.loopback.stays_here import stays_here

# derandomize: a run depends on the code alone. No deadline: the first call of a kernel compiles it.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


# The Pythons that tests start stay on this machine too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("loopback")), os.environ.get("PYTHONPATH")])
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection or name beyond loopback fails the test, whatever the code does with the error."""

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not stays_here(address[0]):
                pytest.fail(f"connected to {address}: tests stay on this machine")
            return real(self, address)

        return connect

    def lookup(host: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if not stays_here(name):
            pytest.fail(f"looked up {name}: tests stay on this machine")
        return real_lookup(host, *args, **options)

    real_lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


@pytest.fixture(scope="session")
def measured_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_cache_of_the_users(measured_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests measure of the machine is kept for the run, and not where the user's own measurements are."""
    monkeypatch.setattr("nemotron_h.machine.cache_folder", lambda: measured_here)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads; what they were is put back."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
