"""Where Flower keeps what it does not publish, by version; a clear refusal where it is missing."""

import importlib
import importlib.metadata
from collections.abc import Mapping
from functools import cache
from typing import Any

from fedllm_flwr.errors import FederationError

RANGE = ">=1.31,<1.43"  # of flwr, as in pyproject.toml
SEEN = ("1.31", "1.42")  # versions with which servers and sites have been run
_OLD, _NEW = SEEN
_MODULE = " module"


def _everywhere(name: str) -> dict[str, str]:
    return dict.fromkeys(SEEN, name)


# Key -> version in which it was seen -> dotted name: of a module, if the key ends so.
NAMES: Mapping[str, Mapping[str, str]] = {
    # A run's app at the server: replies are checked before they are fetched.
    "SuperLinkGrid": {
        _OLD: "flwr.superlink.grid.grpc_grid.GrpcGrid",
        _NEW: "flwr.superlink.grid.http_grid.HttpGrid",
    },
    "InMemoryGrid": _everywhere("flwr.superlink.grid.inmemory_grid.InMemoryGrid"),
    "RuntimeClient": {
        _OLD: "flwr.proto.serverappio_pb2_grpc.ServerAppIoStub",
        _NEW: "flwr.supercore.runtime.RuntimeHttpClient",
    },
    "RuntimeToken": {
        _OLD: "flwr.supercore.interceptors.AppIoTokenClientInterceptor",
        _NEW: "flwr.supercore.interceptors.RuntimeTokenHttpInterceptor",
    },
    "RuntimeVersion": {
        _OLD: "flwr.supercore.interceptors.RuntimeVersionClientInterceptor",
        _NEW: "flwr.supercore.interceptors.RuntimeVersionHttpInterceptor",
    },
    "make_retry_invoker": {
        _OLD: "flwr.common.retry_invoker.make_simple_grpc_retry_invoker",
        _NEW: "flwr.supercore.retry.make_simple_http_retry_invoker",
    },
    "wrap_stub": {
        _OLD: "flwr.common.retry_invoker.wrap_stub",
        _NEW: "flwr.supercore.retry.wrap_stub",
    },
    "create_channel": {
        _OLD: "flwr.common.grpc.create_channel",
        _NEW: "flwr.supercore.grpc.create_channel",
    },
    "PullAppMessagesRequest": {
        _OLD: "flwr.proto.appio_pb2.PullAppMessagesRequest",
        _NEW: "flwr.proto.runtime_pb2.PullAppMessagesRequest",
    },
    "PullObjectRequest": _everywhere("flwr.proto.message_pb2.PullObjectRequest"),
    "PushObjectRequest": _everywhere("flwr.proto.message_pb2.PushObjectRequest"),
    "ConfirmMessageReceivedRequest": _everywhere(
        "flwr.proto.message_pb2.ConfirmMessageReceivedRequest"
    ),
    "Node": _everywhere("flwr.proto.node_pb2.Node"),
    "SUPERLINK_NODE_ID": _everywhere("flwr.common.constant.SUPERLINK_NODE_ID"),
    "MAX_ARRAY_CHUNK_SIZE": _everywhere("flwr.common.constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"),
    "TaskIdentity": {_NEW: "flwr.supercore.task_identity.TaskIdentity"},
    "make_message": _everywhere("flwr.app.message.make_message"),
    "get_all_nested_objects": _everywhere(
        "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects"
    ),
    "get_object_head_values": _everywhere(
        "flwr.supercore.inflatable.inflatable_object.get_object_head_values_from_object_content"
    ),
    "iterate_object_tree": _everywhere(
        "flwr.supercore.inflatable.inflatable_object.iterate_object_tree"
    ),
    "inflate_object": _everywhere(
        "flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents"
    ),
    # Programs of a server and of a site, and what is replaced in them.
    "superlink": {
        _OLD: "flwr.server.app.run_superlink",
        _NEW: "flwr.superlink.cli.flower_superlink",
    },
    "sql module": _everywhere("flwr.supercore.sql_mixin"),
    "SqlCoreState": {_NEW: "flwr.supercore.corestate.sql_corestate.SqlCoreState"},
    "superexec": _everywhere("flwr.supercore.cli.flower_superexec"),
    "executor module": _everywhere("flwr.supercore.superexec.executor.subprocess_executor"),
    "task plugin": {_NEW: "flwr.supercore.superexec.plugin.base_exec_plugin.AutoExecPlugin"},
    "TaskType": _everywhere("flwr.supercore.constant.TaskType"),
    "supernode": _everywhere("flwr.supernode.cli.flower_supernode"),
    "supernode module": _everywhere("flwr.supernode.start_client_internal"),
    "supernode api module": {_NEW: "flwr.supernode.main"},
    "clientapp": _everywhere("flwr.supernode.cli.flwr_clientapp"),
    "clientapp module": _everywhere("flwr.supernode.runtime.run_clientapp"),
    # A site's connection over gRPC, which the newest SuperNode no longer brings.
    "fleet module": {_NEW: "flwr.supernode.fleet_http_connection"},
    "FleetStub": _everywhere("flwr.proto.fleet_pb2_grpc.FleetStub"),
    "sign_message": _everywhere("flwr.supercore.primitives.asymmetric.sign_message"),
    "public_key_to_bytes": _everywhere("flwr.supercore.primitives.asymmetric.public_key_to_bytes"),
}


def version() -> str:
    """Of the installed Flower."""
    return importlib.metadata.version("flwr")


def is_seen(installed: str) -> bool:
    """Whether a version of Flower is one of those with which everything is tested."""
    return installed.startswith(tuple(f"{seen}." for seen in SEEN))


@cache
def is_http() -> bool:
    """Whether the installed Flower's apps and commands speak HTTP with a SuperLink."""
    return _found("RuntimeClient", _NEW) is not None


@cache
def find(key: str) -> Any:
    """What the table calls `key`, from where the installed Flower keeps it.

    Raises:
        FederationError: it keeps it nowhere that is known.
    """
    if (found := find_if_there(key)) is not None:
        return found
    raise FederationError(missing(NAMES[key][max(NAMES[key])]))


@cache
def find_if_there(key: str) -> Any:
    """The same; None where it is missing."""
    places = (_found(key, seen) for seen in reversed(list(NAMES[key])))
    return next((found for found in places if found is not None), None)


def missing(name: str) -> str:
    """That the installed Flower lacks a name, and what to install."""
    return (
        f"Flower {version()} has no {name}; install a version that was seen to work: "
        f"pip install 'flwr[simulation]=={SEEN[-1]}.*' or '=={SEEN[0]}.*'"
    )


def _found(key: str, seen: str) -> Any:
    name = NAMES[key].get(seen)
    if name is None:
        return None
    module, _, attribute = name.rpartition(".")
    try:
        if key.endswith(_MODULE):
            return importlib.import_module(name)
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None
