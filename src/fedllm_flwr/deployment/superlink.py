"""``flower-superlink`` with longer timeouts for its own database, and after a restart.

Flower gives a query of its SQLite file 5 s to get the lock. After that, the API call fails, and the
SuperNode that made it ends. Removing one reply of a gigabyte, in one transaction, holds the lock
for longer, so that one site could end all others.

Flower considers a run's app or a site dead if it has not heard from it for a minute, even if the
SuperLink itself was down; the run then fails.

Flower 1.42 rejects a piece of a reply that it already has, even from another site.

The options are those of Flower 1.31. A newer SuperLink serves a run's app and `flwr` over HTTP,
here at the address given for `flwr` (``--control-api-address``), and the sites over gRPC if told
to.
"""

import logging
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm_flwr.deployment.programs import require_seen
from fedllm_flwr.flower.names import find, is_http, missing

_GRPC_FOR_SITES = "FLWR_INTERNAL_GRPC_FLEET_API"  # Flower 1.40 to 1.42
_INSTALLED_ENVIRONMENT = "--disable-runtime-dependency-installation"  # and none of its own per run
BUSY_MS = 60_000  # time that a query waits for the database
_ABSENCE_S = 600.0  # downtime after which sites and `fedllm server run` have given up, too
_WORD_S = 60.0  # for apps and sites to reconnect to the restarted SuperLink


def main() -> None:
    """Run Flower's command on this process's arguments."""
    require_seen()
    wait_for_the_database()
    if "--database" in sys.argv[:-1]:
        expect_back(Path(sys.argv[sys.argv.index("--database") + 1]))
    options = sys.argv[1:]
    if is_http():
        os.environ[_GRPC_FOR_SITES] = "1"
        options = in_terms_of_http(options)
        take_pieces_twice(find("SqlCoreState"))
        # A line for each call would bury the rest: a run's app asks several times a second.
        logging.getLogger("uvicorn.access").addFilter(lambda _: False)
    sys.argv = ["flower-superlink", *options]
    find("superlink")()


def in_terms_of_http(options: Sequence[str]) -> list[str]:
    """Options of Flower 1.31's SuperLink for one that serves HTTP beside gRPC for the sites."""
    found = list(options)
    for name in ("--serverappio-api-address", "--control-api-address"):
        if name in found:
            at = found.index(name)
            host, _, port = found[at + 1].rpartition(":")
            found[at : at + 2] = []
    return [*found, "--host", host.strip("[]"), "--port", port, _INSTALLED_ENVIRONMENT]


def wait_for_the_database() -> None:
    """Increase Flower's timeout for database connections opened from now on.

    Exits with a message if this version of Flower defines it elsewhere.
    """
    sql_mixin = find("sql module")
    pragmas = dict(getattr(sql_mixin, "SQLITE_PRAGMAS", ()))
    if "busy_timeout" not in pragmas:
        sys.exit(
            f"error: the patience of its database is set elsewhere: "
            f"{missing(f'{sql_mixin.__name__}.SQLITE_PRAGMAS')}"
        )
    pragmas["busy_timeout"] = str(BUSY_MS)
    sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())


def take_pieces_twice(state: type) -> None:
    """Let `state`, that of Flower 1.42's SuperLink, take a piece of a reply that it has already.

    It refuses one, and the reply breaks off: where a site repeats a piece because the answer was
    lost, and where a site of Flower 1.31 sends what another sends at the same time, such as zeros.

    Exits with a message if this version of Flower takes pieces by other means.
    """
    store = getattr(state, "store_object", None)
    if store is None:
        sys.exit(f"error: pieces of replies: {missing(f'{state.__module__}.store_object')}")

    def store_object(
        self: Any, run_id: int, session_id: str, object_id: str, object_content: bytes
    ) -> bool:
        if session_id and store(self, run_id, session_id, object_id, object_content):
            return True
        try:  # the piece's id is its digest, and has to be known
            self.object_store.put(object_id, object_content)
        except Exception as error:  # of a database, or of one of many checks
            print(f"piece {object_id}: {error}", file=sys.stderr)
            return False
        return True

    state.store_object = store_object  # type: ignore[attr-defined]


def expect_back(file: Path) -> None:
    """Give all apps and sites of the previous SuperLink a minute to reconnect.

    Prints a message and does nothing if this version of Flower has another database schema.
    """
    if not file.is_file():
        return
    now = time.time()
    until, since = now + _WORD_S, now - _ABSENCE_S
    try:
        with closing(sqlite3.connect(file, BUSY_MS / 1000)) as database, database:
            database.execute(
                "UPDATE node SET online_until = MAX(online_until, ?)"
                " WHERE status = 'online' AND online_until > ?",
                (until, since),
            )
            # As Flower writes it: UTC, in a format that sorts by time.
            database.execute(
                "UPDATE task SET active_until = MAX(active_until, ?)"
                " WHERE token IS NOT NULL AND finished_at IS NULL AND active_until > ?",
                (_text(until), _text(since)),
            )
    except sqlite3.OperationalError as error:
        print(f"{file}: who was connected before cannot be read ({error})", file=sys.stderr)


def _text(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(" ", "microseconds")


if __name__ == "__main__":
    main()
