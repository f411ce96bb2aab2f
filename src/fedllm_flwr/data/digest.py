"""Digests of records: whether a run goes on with the data that it was begun with."""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

_BATCH = 1000  # records


def records_digest(records: "datasets.Dataset") -> str:
    """SHA-256 of the records in their order, in hexadecimal; a file's layout does not enter it."""
    digest = hashlib.sha256()
    for batch in records.iter(_BATCH):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()
