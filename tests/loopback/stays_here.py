"""Is a host the machine itself?"""

import ipaddress
import socket
from typing import Any


def stays_here(host: Any) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False
