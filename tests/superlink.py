"""A SuperLink's API for a run's app over Flower's own object store.

Replies arrive piece by piece, and it may die while it takes messages.
"""

from collections.abc import Iterable

import grpc
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedllm_flwr.flower.names import find, is_http

if is_http():
    from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
    from flwr.supercore.run import Run
else:
    from flwr.common.typing import Run
    from flwr.proto.appio_pb2 import PullAppMessagesResponse, PushAppMessagesResponse

RUN = 1


class StoredReplies:
    """The stub of the API: `begin` is a reply's metadata and tree, `continue_` one object of it."""

    def __init__(self) -> None:
        self.store = InMemoryObjectStore()
        self.pulled: list[str] = []
        self._told: dict[str, tuple[ProtoMessage, ObjectTree]] = {}
        self._left: dict[str, list[tuple[str, bytes]]] = {}

    def begin(self, reply: Message, sender: int | None = None) -> str:
        """Announce a reply, as from the node `sender`; the id of the message that it answers."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.store.preregister(RUN, get_object_tree(reply))
        objects = get_all_nested_objects(reply)
        self._left[reply.object_id] = [(key, value.deflate()) for key, value in objects.items()]
        answered = reply.metadata.reply_to_message_id
        proto = message_to_proto(remove_content_from_message(reply))
        proto.metadata.src_node_id = sender or reply.metadata.src_node_id
        self._told[answered] = (proto, get_object_tree(reply))
        return answered

    def continue_(self, reply: Message, count: int = 10**6) -> None:
        """Let `count` more of its objects arrive, in Flower's order."""
        left = self._left[reply.object_id]
        for object_id, content in left[:count]:
            self.store.put(object_id, content)
        del left[:count]

    def PullMessages(self, request) -> PullAppMessagesResponse:  # noqa: N802
        """Each reply is told of once."""
        found = [self._told.pop(key) for key in request.message_ids if key in self._told]
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def PullObject(self, request) -> PullObjectResponse:  # noqa: N802
        """An object as far as it is there."""
        self.pulled.append(request.object_id)
        content = self.store.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None,
            object_available=bool(content),
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request) -> ConfirmMessageReceivedResponse:  # noqa: N802
        """The reply is deleted."""
        self.store.delete(request.message_object_id)
        return ConfirmMessageReceivedResponse()


def asked(messages: Iterable[Message]) -> list[Message]:
    """Messages as a grid stamps them."""
    stamped = list(messages)
    for message in stamped:
        message.metadata.__dict__.update(_run_id=RUN, _src_node_id=1)
        message.metadata.__dict__["_message_id"] = message.object_id
    return stamped


class Dead(grpc.RpcError):
    """What a client sees of a SuperLink that finds a message's id taken."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN

    def details(self) -> str:
        return "Exception calling application: UNIQUE constraint failed: message_ins.message_id"


class StoredMessages:
    """The client of a SuperLink that dies once after storing `dies_after` messages of a push.

    As over Flower's grid, the same push then finds it again, with what it has stored.
    """

    def __init__(self, dies_after: int) -> None:
        self.store = InMemoryObjectStore()
        self.messages: list[str] = []
        self._left = dies_after

    def grid(self) -> Grid:
        """Flower's grid on this stub."""
        grid = find("SuperLinkGrid")(token="token")
        grid._channel, grid._grpc_stub, grid._client = object(), self, self
        grid.set_run(Run.create_empty(RUN))
        return grid

    def PushMessages(self, request) -> PushAppMessagesResponse:  # noqa: N802
        """Objects are announced, then the metadata stored, one message after the other."""
        lacking = set()
        pairs = zip(request.messages_list, request.message_object_trees, strict=True)
        for proto, tree in pairs:
            lacking |= set(self.store.preregister(RUN, tree))
            if proto.metadata.message_id in self.messages:
                if not is_http():
                    raise Dead
                continue  # Flower 1.42 takes it twice
            self.messages.append(proto.metadata.message_id)
            self._left -= 1
            if self._left == 0:
                return self.PushMessages(request)
        ids = [proto.metadata.message_id for proto in request.messages_list]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=lacking)

    def PushObject(self, request) -> PushObjectResponse:  # noqa: N802
        """An object that was announced."""
        self.store.put(request.object_id, request.object_content)
        return PushObjectResponse(stored=True)
