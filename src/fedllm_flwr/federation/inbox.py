"""Fetches replies as they become complete, and checks each against the request while fetching it.

A reply reaches the SuperLink in two steps: first its metadata and its object tree (a message, its
records, arrays and chunks of their bytes), then the objects one by one, the message last. Over a
slow link, seconds or minutes pass between the two. Flower's own `Grid` blocks on the second step of
one reply while all others wait, and treats a late reply as a failure. Here, a reply that has begun
to arrive is polled without blocking until it is complete.

The request bounds what is fetched: the size of the tree, the names of records and the numbers of
bytes of their arrays are checked from the top down, so that an unexpected reply is rejected, and
removed from the SuperLink's database, before its bytes are read.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

from flwr.app import Error, Message, Metadata
from flwr.serverapp import Grid

from fedllm_flwr.federation.packing import most_bytes
from fedllm_flwr.flower.names import find
from fedllm_flwr.flower.runtime import (
    bounded_client,
    call_errors,
    is_superlink_grid,
    is_too_large,
    patiently,
)
from fedllm_flwr.params import Params

BROKE_OFF, REFUSED = 3, 1000  # error codes: Flower's for an unavailable reply, and our own
_UPLOAD_S, _SLOWEST_UPLOAD = 60.0, 50e3  # time for a started reply to arrive: seconds, bytes/s
_BUFFER_BYTES = 64 * 2**20  # of replies fetched together from a grid that returns whole replies
_MOST_AT_ONCE = 64
_LARGEST_RECORD = 2**16  # bytes of one record of numbers or texts, or of one list of names
_LARGEST_ANSWER = 2**26  # bytes of one SuperLink response; the largest is a chunk
_RECORDS = 8  # per reply
_PULLS = 4  # objects fetched concurrently


@dataclass(frozen=True)
class Expected:
    """What a reply may contain: small records, and records with one array of bounded size."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def like(cls, **groups: Params) -> "Expected":
        """Tensors of these names and shapes, by record."""
        return cls({name: most_bytes(params) for name, params in groups.items()})

    @cached_property
    def num_bytes(self) -> int:
        """Upper bound of the bytes of all tensors."""
        return sum(self.sizes.values())

    @cached_property
    def num_objects(self) -> int:
        """Upper bound of the number of Flower objects in such a reply."""
        return 2 + _RECORDS + sum(1 + _num_chunks(size) for size in self.sizes.values())


NO_TENSORS = Expected()


class Inbox(Protocol):
    """Receives the replies to the server's messages."""

    def take(self, message_ids: Iterable[str], expected: Expected) -> Iterator[Message]:
        """Yield the replies to these messages that are complete, each once, without waiting."""

    def arriving(self, message_ids: Iterable[str]) -> list[str]:
        """Those of the messages whose replies have begun to arrive and are not complete."""


def open_inbox(grid: Grid) -> Inbox:
    """The inbox of a run."""
    if is_superlink_grid(grid):
        return SuperLinkInbox(bounded_client(grid, _LARGEST_ANSWER), grid.run.run_id)
    return GridInbox(grid)


class GridInbox:
    """Inbox for a grid whose nodes are in this process or on this machine."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def take(self, message_ids: Iterable[str], expected: Expected) -> Iterator[Message]:
        """Yield the replies that have arrived, a few at a time to bound memory."""
        wanted = list(message_ids)
        at_once = max(1, min(_MOST_AT_ONCE, _BUFFER_BYTES // max(1, expected.num_bytes)))
        for start in range(0, len(wanted), at_once):
            some = wanted[start : start + at_once]
            replies = patiently(lambda some=some: list(self._grid.pull_messages(some)))  # type: ignore[misc]
            while replies:
                yield replies.pop(0)

    def arriving(self, message_ids: Iterable[str]) -> list[str]:
        """Always empty, since replies arrive as a whole."""
        return []


class _Refused(Exception):  # noqa: N818 - a verdict on a reply, not a failure of the program
    """The reply contains something that was not requested."""


class _NotYet(Exception):  # noqa: N818
    """An object of the reply has not arrived."""


@dataclass(frozen=True)
class _Arrival:
    """A reply whose objects are still arriving."""

    message_id: str
    reply_to: str
    sender: int  # node id, as the SuperLink knows it
    tree: Any  # Flower's ObjectTree
    until: float  # time.monotonic() after which it counts as broken off


class SuperLinkInbox:
    """Replies that a SuperLink holds, fetched over the API for a run's app.

    Args:
        stub: a client of that API, see `flower.runtime`.
        run_id: Flower's id of the run.
    """

    def __init__(self, stub: Any, run_id: int) -> None:
        self._stub = stub
        self._run_id = run_id
        self._node = find("Node")(node_id=find("SUPERLINK_NODE_ID"))
        self._arrivals: dict[str, _Arrival] = {}

    def take(self, message_ids: Iterable[str], expected: Expected) -> Iterator[Message]:
        """Yield replies that are complete, rejected or timed out, holding one in memory."""
        wanted = list(message_ids)
        self._look(wanted, expected)
        for message_id in wanted:
            arrival = self._arrivals.get(message_id)
            if arrival is not None and (reply := self._finished(arrival, expected)) is not None:
                del self._arrivals[message_id]
                yield reply
                del reply  # else it would stay until the next one is there

    def arriving(self, message_ids: Iterable[str]) -> list[str]:
        """Those of the messages whose replies have begun to arrive and are not complete."""
        return [message_id for message_id in message_ids if message_id in self._arrivals]

    def _look(self, message_ids: list[str], expected: Expected) -> None:
        """Record which replies have begun to arrive; the SuperLink reports each only once."""
        if not (unknown := [wanted for wanted in message_ids if wanted not in self._arrivals]):
            return
        request = find("PullAppMessagesRequest")(message_ids=unknown)
        try:
            found = patiently(lambda: self._stub.PullMessages(request))
        except call_errors() as error:
            if not is_too_large(error):
                raise
            return  # one of the trees; the SuperLink answers with errors when it is asked again
        until = time.monotonic() + _UPLOAD_S + expected.num_bytes / _SLOWEST_UPLOAD
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            about = proto.metadata
            self._arrivals[about.reply_to_message_id] = _Arrival(
                about.message_id, about.reply_to_message_id, about.src_node_id, tree, until
            )

    def _finished(self, arrival: _Arrival, expected: Expected) -> Message | None:
        """The reply, or an error in its place; None while it is still arriving."""
        try:
            contents = self._contents(arrival, expected)
            message = cast(Message, find("inflate_object")(arrival.message_id, contents))
            about = message.metadata
            if (about.reply_to_message_id, about.src_node_id) != (arrival.reply_to, arrival.sender):
                raise _Refused("it names another sender, or answers another message")
            about.__dict__["_message_id"] = arrival.message_id
        except _NotYet:
            if time.monotonic() < arrival.until:
                return None
            answer = self._error(arrival, BROKE_OFF, "the rest of it did not arrive")
        except _Refused as refused:
            answer = self._error(arrival, REFUSED, str(refused))
        except call_errors() as error:
            if not is_too_large(error):
                raise
            answer = self._error(
                arrival, REFUSED, f"a part of it is larger than {_LARGEST_ANSWER >> 20} MB"
            )
        except Exception as error:  # a site can send any bytes
            text = f"it cannot be read ({type(error).__name__}: {error})"
            answer = self._error(arrival, REFUSED, text)
        else:
            answer = message
        confirmed = find("ConfirmMessageReceivedRequest")(
            node=self._node, run_id=self._run_id, message_object_id=arrival.message_id
        )
        # Removes the reply, including parts still being sent, from the SuperLink's database.
        patiently(lambda: self._stub.ConfirmMessageReceived(confirmed))
        return answer

    def _contents(self, arrival: _Arrival, expected: Expected) -> dict[str, bytes]:
        """All objects of a reply by id, fetched from the top down and checked at each level.

        Raises:
            _NotYet: one of them has not arrived.
            _Refused: it does not match the request.
        """
        most = expected.num_objects
        for number, _ in enumerate(find("iterate_object_tree")(arrival.tree), 1):
            if number > most:
                raise _Refused(f"it has more than {most} parts, the most that were asked for")
        check = _Check(expected)
        contents: dict[str, bytes] = {}
        level = [arrival.message_id]
        with ThreadPoolExecutor(_PULLS) as pool:
            while level:
                found = dict(zip(level, pool.map(self._pull, level), strict=True))
                contents |= found
                children = dict.fromkeys(
                    child for object_id in level for child in check(object_id, found[object_id])
                )
                level = [child for child in children if child not in contents]
        return contents

    def _pull(self, object_id: str) -> bytes:
        request = find("PullObjectRequest")(
            node=self._node, run_id=self._run_id, object_id=object_id
        )
        answer = patiently(lambda: self._stub.PullObject(request))
        if not answer.object_found:
            raise _Refused("it lacks one of its parts")
        if not answer.object_available:
            raise _NotYet
        return cast(bytes, answer.object_content)

    def _error(self, arrival: _Arrival, code: int, reason: str) -> Message:
        """An error reply as the SuperLink would create it."""
        metadata = Metadata(
            run_id=self._run_id,
            message_id="",
            src_node_id=find("SUPERLINK_NODE_ID"),
            dst_node_id=find("SUPERLINK_NODE_ID"),
            message_type="system",
            group_id="",
            ttl=0,
            reply_to_message_id=arrival.reply_to,
            created_at=time.time(),
        )
        return cast(Message, find("make_message")(metadata=metadata, error=Error(code, reason)))


class _Check:
    """Checks the objects of one reply against the request, from the message down."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._records: dict[str, str] = {}  # names by object id
        self._arrays: dict[str, tuple[str, int]] = {}  # record and most bytes, by object id
        self._left = 0  # bytes of chunks that may still come

    def __call__(self, object_id: str, content: bytes) -> list[str]:
        """Check an object and return the ids of its children.

        Raises:
            _Refused: a record or a size was not requested.
        """
        kind, children, size = find("get_object_head_values")(content)
        if kind == "ArrayChunk":
            if size > find("MAX_ARRAY_CHUNK_SIZE"):
                raise _Refused(f"a piece of an array holds {size} bytes, more than Flower sends")
            self._left -= size
            if self._left < 0:
                raise _Refused("the arrays have more bytes than the tensors asked for")
            return []
        if size > _LARGEST_RECORD:
            raise _Refused(f"a record of {size} bytes, above {_LARGEST_RECORD}")
        body = content[-size:] if size else b""
        if kind == "RecordDict":
            self._records = {child: name for name, child in json.loads(body).items()}
        elif kind == "ArrayRecord":
            self._expect_array(self._records.get(object_id, ""), json.loads(body))
        elif kind == "Array":
            self._take_pieces(*self._arrays[object_id], json.loads(body)["arraychunk_ids"])
        return cast(list[str], children)

    def _expect_array(self, record: str, ids: Mapping[str, str]) -> None:
        size = self._expected.sizes.get(record)
        if size is None:
            raise _Refused(f"arrays {record[:100]!r} were not asked for")
        if len(ids) != 1:
            raise _Refused(f"{record!r} has {len(ids)} arrays instead of one")
        self._arrays[next(iter(ids.values()))] = record, size
        self._left += size

    def _take_pieces(self, record: str, size: int, pieces: list[str]) -> None:
        if len(pieces) > _num_chunks(size):  # one piece may occur several times
            raise _Refused(f"{record!r} has more bytes than the {size:,} of the tensors asked for")


def _num_chunks(size: int) -> int:
    return 1 + size // cast(int, find("MAX_ARRAY_CHUNK_SIZE"))
