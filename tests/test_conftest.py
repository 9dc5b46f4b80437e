import socket
import subprocess
import sys

import pytest


def test_connections_beyond_loopback_fail_the_test() -> None:
    with socket.socket() as outside, pytest.raises(pytest.fail.Exception, match=r"192\.0\.2\.1"):
        outside.connect(("192.0.2.1", 80))
    with pytest.raises(pytest.fail.Exception, match=r"looked up example\.org"):
        socket.create_connection(("example.org", 80))


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as caller:
        peer, address = server.accept()
        peer.close()
        assert address == caller.getsockname()


@pytest.mark.parametrize(
    "going",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.getaddrinfo('example.org', 80)",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    ],
)
def test_a_python_that_a_test_starts_ends_where_it_leaves_the_machine(going: str) -> None:
    code = f"import socket\ntry:\n    {going}\nexcept BaseException:\n    pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 97
    assert "tests stay on this machine" in done.stderr


def test_and_is_free_to_talk_to_itself() -> None:
    code = (
        "import socket\n"
        "with socket.create_server(('127.0.0.1', 0)) as s, socket.create_connection(s.getsockname()):\n"
        "    s.accept()[0].close()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
