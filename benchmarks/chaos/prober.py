"""A process of its own that asks `/health` again and again: the clients' event loop may stand still itself.

    python benchmarks/chaos/prober.py PORT

Prints the seconds that each answer took, one a line, until it is ended.
"""

import http.client
import sys
import time

INTERVAL = 0.25
TIMEOUT = 60.0


def main(port: int) -> None:
    """Raises if the server refuses the connection, or answers anything but 200."""
    while True:
        start = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        connection.request("GET", "/health")
        status = connection.getresponse().status
        connection.close()
        if status != http.client.OK:
            raise SystemExit(f"/health answered {status}")
        print(time.monotonic() - start, flush=True)
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
