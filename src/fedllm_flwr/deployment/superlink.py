"""Flower's ``flower-superlink`` with more patience for its own database.

Flower gives a query of its SQLite file 5 s to get the lock; then the API call fails, and a
SuperNode ends whose call it was. One reply of a gigabyte, whose removal is one transaction, holds
the lock for longer than that, so that one site could end all others.
"""

import sys

BUSY_MS = 60_000  # that a query waits for the database


def main() -> None:
    """Run Flower's command on this process's arguments."""
    wait_for_the_database()
    from flwr.server.app import run_superlink

    sys.argv[0] = "flower-superlink"
    run_superlink()


def wait_for_the_database() -> None:
    """Raise Flower's limit for the connections that it opens from now on.

    Exits with a message if this version of Flower keeps it elsewhere.
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


if __name__ == "__main__":
    main()
