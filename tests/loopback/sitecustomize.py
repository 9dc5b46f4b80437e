"""Found by every Python that a test starts (conftest.py sets PYTHONPATH): one that leaves this machine ends at once."""

import os
import sys
from typing import Any

from stays_here import stays_here


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None  # None: a path on this machine
    elif event == "socket.getaddrinfo":
        host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
    else:
        return
    if not stays_here(host):
        sys.stderr.write(f"went to {host}: tests stay on this machine\n")
        sys.stderr.flush()
        os._exit(97)  # nothing can catch it


sys.addaudithook(watch)
