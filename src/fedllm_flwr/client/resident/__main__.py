"""Command line of the resident trainer, used by the ClientApp that starts it."""

import logging
import sys
from pathlib import Path

from fedllm_flwr.client.resident.worker import serve

if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    socket_path, parent, idle_timeout_s = sys.argv[1:]
    serve(Path(socket_path), int(parent), float(idle_timeout_s))
