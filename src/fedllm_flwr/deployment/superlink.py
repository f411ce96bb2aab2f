"""``flower-superlink`` with longer timeouts for its own database, and after a restart.

Flower gives a query of its SQLite file 5 s to get the lock. After that, the API call fails, and the
SuperNode that made it ends. Removing one reply of a gigabyte, in one transaction, holds the lock
for longer, so that one site could end all others.

Flower considers a run's app or a site dead if it has not heard from it for a minute, even if the
SuperLink itself was down; the run then fails.
"""

import sqlite3
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

BUSY_MS = 60_000  # time that a query waits for the database
_ABSENCE_S = 600.0  # downtime after which sites and `fedllm server run` have given up, too
_WORD_S = 60.0  # for apps and sites to reconnect to the restarted SuperLink


def main() -> None:
    """Run Flower's command on this process's arguments."""
    wait_for_the_database()
    if "--database" in sys.argv[:-1]:
        expect_back(Path(sys.argv[sys.argv.index("--database") + 1]))
    from flwr.server.app import run_superlink

    sys.argv[0] = "flower-superlink"
    run_superlink()


def wait_for_the_database() -> None:
    """Increase Flower's timeout for database connections opened from now on.

    Exits with a message if this version of Flower defines it elsewhere.
    """
    from flwr.supercore import sql_mixin

    pragmas = dict(getattr(sql_mixin, "SQLITE_PRAGMAS", ()))
    if "busy_timeout" not in pragmas:
        sys.exit(
            "error: this version of Flower sets the patience of its database elsewhere; install "
            "the version that fedllm-flwr asks for"
        )
    pragmas["busy_timeout"] = str(BUSY_MS)
    sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())  # type: ignore[assignment, attr-defined]


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
