"""The image's health check: exit status 0 while the server would serve a request, else 1 and the reason.

Asks the operations port where there is one, as it needs no key. Standard library only.
"""

import http.client
import os
import sys

TIMEOUT = 4.0  # seconds, below the Dockerfile's


def main() -> int:
    """0 or 1, as Docker wants it. Never through a proxy, hence not urllib, which reads http_proxy."""
    port = int(os.environ.get("MEDUSA_METRICS_PORT") or os.environ.get("MEDUSA_PORT") or 8000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        body = response.read(2000).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        body, status = f"no answer on port {port}: {error}", 0
    else:
        status = response.status
    finally:
        connection.close()
    sys.stdout.write(body + "\n")
    return 0 if status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
