"""What is used of Flower beyond its public packages, and the newer Flower's other ways."""

import re
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from packaging.specifiers import SpecifierSet

from fedllm_flwr.deployment import programs
from fedllm_flwr.deployment.superlink import in_terms_of_http
from fedllm_flwr.errors import FederationError
from fedllm_flwr.flower import names
from fedllm_flwr.flower.fleet import FleetGrpcClient, connect_over_grpc

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("key", names.NAMES)
def test_each_name_is_where_it_was_seen(key: str) -> None:
    """Under a version of the table; under another there is nothing to hold."""
    seen = ".".join(names.version().split(".")[:2])
    if seen not in names.NAMES[key]:
        pytest.skip(f"not needed under Flower {names.version()}")
    assert names.find(key) is not None


def test_what_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.NAMES, "gone", {"1.42": "flwr.supercore.gone.Gone"})  # type: ignore[arg-type]
    with pytest.raises(FederationError, match=r"has no flwr\.supercore\.gone\.Gone; install"):
        names.find("gone")
    with pytest.raises(FederationError, match=r"has no flwr\.new\.FleetHttpClient"):
        connect_over_grpc(ModuleType("flwr.new"))


@pytest.mark.parametrize("version", ["1.30.1", "1.36.0", "1.43.0", "2.0.0"])
def test_servers_and_sites_refuse_a_flower_that_was_not_seen(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "version", lambda: version)
    with pytest.raises(SystemExit, match=f"tested with Flower 1.31 and 1.42, not with {version}"):
        programs.require_seen()


def test_the_page_lists_all_names() -> None:
    text = (DOCS / "flower-versions.md").read_text("utf-8")
    listed = set(re.findall(r"`(flwr(?:\.\w+)+)`", text))
    used = {name for places in names.NAMES.values() for name in places.values()}
    assert used - listed == set()


def test_an_installation_takes_both_ends_of_the_range() -> None:
    root = DOCS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    [asked] = [d for d in project["dependencies"] if d.startswith("flwr[simulation]")]
    assert asked == f"flwr[simulation]{names.RANGE}"
    assert all(f"{seen}.0" in SpecifierSet(names.RANGE) for seen in names.SEEN)
    held = f"=={names.SEEN[0]}.*"
    assert f"flwr{held}" in (root / "constraints.txt").read_text().splitlines()
    for file in ("Dockerfile", "compose.yaml"):
        assert f"flwr[simulation]{held}" in (root / "docker" / file).read_text()


SUPERLINK = (
    "--database superlink.db --serverappio-api-address 127.0.0.1:9191 "
    "--control-api-address 127.0.0.1:9193 --fleet-api-address 0.0.0.0:9192 --insecure"
)


def test_options_of_a_superlink_that_serves_http() -> None:
    """Over HTTP only on the private address; the sites' own port is gRPC's."""
    assert in_terms_of_http(SUPERLINK.split()) == [
        *("--database", "superlink.db", "--fleet-api-address", "0.0.0.0:9192", "--insecure"),
        *("--host", "127.0.0.1", "--port", "9193"),
        "--disable-runtime-dependency-installation",
    ]
    assert "::1" in in_terms_of_http(["--control-api-address", "[::1]:9193"])


class Fleet(grpc.GenericRpcHandler):
    """A SuperLink's Fleet API that answers with a status, and notes who asks."""

    def __init__(self) -> None:
        self.status = grpc.StatusCode.OK
        self.metadata: dict[str, Any] = {}

    def service(self, details: Any) -> Any:
        self.metadata = dict(details.invocation_metadata)

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            if self.status is not grpc.StatusCode.OK:
                context.abort(self.status, "said so")
            found: bytes = ActivateNodeResponse(node_id=7).SerializeToString()
            return found

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def fleet() -> Iterator[tuple[Fleet, FleetGrpcClient, ec.EllipticCurvePrivateKey]]:
    handler, key = Fleet(), ec.generate_private_key(ec.SECP384R1())
    interceptor = ModuleType("of the site's key")
    interceptor._private_key = key  # type: ignore[attr-defined]
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    address = f"127.0.0.1:{port}"
    with FleetGrpcClient.from_server_address(address, True, None, [interceptor]) as client:
        yield handler, client, key
    server.stop(0)


def test_a_site_signs_what_it_says_over_grpc(fleet: Any) -> None:
    handler, client, key = fleet
    assert client.ActivateNode(ActivateNodeRequest(public_key=b"x")).node_id == 7

    told = handler.metadata
    public = bytes_to_public_key(told["flwr-public-key-bin"])
    assert public.public_numbers() == key.public_key().public_numbers()
    signed = told["flwr-timestamp"].encode(), told["flwr-signature-bin"]
    assert verify_signature(public, *signed)


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, httpx.ConnectError, None),  # it is tried again
        (grpc.StatusCode.PERMISSION_DENIED, httpx.HTTPStatusError, 403),  # the run has ended
        (grpc.StatusCode.UNAUTHENTICATED, httpx.HTTPStatusError, 401),  # the SuperNode ends
        (grpc.StatusCode.FAILED_PRECONDITION, httpx.HTTPStatusError, 400),
    ],
)
def test_errors_over_grpc_are_those_that_a_supernode_knows(
    fleet: Any, status: grpc.StatusCode, kind: type[Exception], code: int | None
) -> None:
    handler, client, _ = fleet
    handler.status = status
    with pytest.raises(kind, match="said so") as caught:
        client.ActivateNode(ActivateNodeRequest())
    assert getattr(getattr(caught.value, "response", None), "status_code", None) == code


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Flower 1.42's programs, which only note what they are started with."""
    kinds = SimpleNamespace(SERVER_APP="server", CLIENT_APP="client", AGENT_APP="agent")
    found: dict[str, Any] = {
        "TaskType": kinds,
        "task plugin": SimpleNamespace(supported_task_types=frozenset(vars(kinds).values())),
        "executor module": SimpleNamespace(__name__="executor", subprocess=None),
        "supernode module": SimpleNamespace(__name__="node", subprocess=None, TaskType=kinds),
        "supernode api module": SimpleNamespace(__name__="api", create_app=None),
        "fleet module": SimpleNamespace(__name__="fleet", FleetHttpClient="over HTTP"),
        "started": [],
    }
    for name in ("superexec", "supernode"):
        found[name] = lambda: found["started"].append(sys.argv)
    monkeypatch.setattr(programs, "is_http", lambda: True)
    monkeypatch.setattr(programs, "require_seen", lambda: None)
    monkeypatch.setattr(programs, "find", found.get)
    return found


def started_as(command: str, newer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["programs", *command.split()])
    programs.main()
    return " ".join(newer["started"][-1])


def test_a_server_starts_apps_of_servers_only(
    newer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS, if the SuperLink has it."""
    own = "flower-superexec --plugin-type serverapp --insecure --appio-api-address a:1"
    monkeypatch.chdir(tmp_path)
    said = started_as(f"{own} --control-api-address a:3", newer, monkeypatch)
    assert said == "flower-superexec --insecure --runtime-api-address a:3"
    assert newer["task plugin"].supported_task_types == {"server"}
    (tmp_path / "ca.crt").touch()
    said = started_as(f"{own} --control-api-address a:3", newer, monkeypatch)
    assert said == "flower-superexec --runtime-api-address a:3 --root-certificates ca.crt"
    with pytest.raises(SystemExit, match="make a new one with `fedllm server init`"):
        started_as(own, newer, monkeypatch)


def test_a_site_starts_apps_of_clients_only(
    newer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent's app would be code of the server's bundle."""
    started_as("flower-superexec --insecure --runtime-api-address a:9", newer, monkeypatch)
    assert newer["task plugin"].supported_task_types == {"client"}
    own = "flower-supernode --superlink a:2 --clientappio-api-address 127.0.0.1:0 --max-retries 3"
    said = started_as(own, newer, monkeypatch)
    assert re.fullmatch(
        r"flower-supernode --superlink a:2 --max-retries 3 --host 127\.0\.0\.1 --port \d{4,5}", said
    )
    assert newer["supernode module"].TaskType.AGENT_APP != "agent"
    assert newer["supernode module"].TaskType.CLIENT_APP == "client"


def test_a_site_speaks_grpc_unless_it_is_told_otherwise(
    newer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "flower-supernode --superlink a:2"
    said = started_as(f"{own} --http --superlink a:8000", newer, monkeypatch)
    assert "--http" not in said.split()
    assert "--superlink a:8000" in said
    assert newer["fleet module"].FleetHttpClient == "over HTTP"
    started_as(own, newer, monkeypatch)
    assert newer["fleet module"].FleetHttpClient is FleetGrpcClient
    monkeypatch.setattr(programs, "is_http", lambda: False)
    with pytest.raises(SystemExit, match="speaks gRPC with its server; leave it out"):
        started_as(f"{own} --http", newer, monkeypatch)
