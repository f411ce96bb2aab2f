"""The whole federation in one process: a `Grid` that calls the ClientApp itself.

Server, strategy, wire encoding and client are the same as in every other engine; only the transport
is a function call. One model is loaded, a debugger works, and nothing runs concurrently.
"""

from collections.abc import Iterable
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedllm_flwr.flower.runtime import act_as_server


class InProcessGrid(Grid):
    """A Flower grid without a network, which answers a message when its reply is pulled.

    Args:
        client_app: answers the messages of all nodes.
        num_clients: number of nodes, with ids from 1 and partition ids from 0.
    """

    def __init__(self, client_app: ClientApp, num_clients: int) -> None:
        self._app = client_app
        self._run_id = uuid4().int >> 65
        act_as_server(self._run_id)
        self._contexts = {
            node_id: Context(
                run_id=self._run_id,
                node_id=node_id,
                node_config={"partition-id": node_id - 1, "num-partitions": num_clients},
                state=RecordDict(),
                run_config={},
            )
            for node_id in range(1, num_clients + 1)
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: object) -> None:
        """Do nothing, as the grid serves one run."""

    @property
    def run(self) -> object:  # type: ignore[override]  # Flower's Run is not public
        """The run's id."""
        return self._run_id

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a Flower message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages, and return their ids."""
        ids = []
        for message in messages:
            message_id = uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            message.metadata.__dict__["_run_id"] = self._run_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the first queued message of `message_ids`, so that only one reply is in memory."""
        for message_id in message_ids:
            if message := self._waiting.pop(message_id, None):
                return [self._app(message, self._contexts[message.metadata.dst_node_id])]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return all answers."""
        return [
            reply
            for message_id in list(self.push_messages(messages))
            for reply in self.pull_messages([message_id])
        ]
