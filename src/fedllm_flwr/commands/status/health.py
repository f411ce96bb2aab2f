"""gRPC health checks of Flower's processes, like grpc_health_probe."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.deployment.starting import SUPERNODE
from fedllm_flwr.errors import ConfigError

_TIMEOUT_S = 5.0
_OPTION = "--health-server-address"


@dataclass(frozen=True)
class Health:
    """Result of one health check; `problem` is empty if the process serves."""

    part: str  # superlink, superexec, supernode or health
    address: str  # host:port
    problem: str

    @property
    def line(self) -> str:
        """The result as a line of text."""
        state = "serving" if not self.problem else f"NOT serving: {self.problem}"
        return f"  {self.part:<12}{state} ({self.address})"


def check_health(part: str, address: str, timeout_s: float = _TIMEOUT_S) -> Health:
    """Query the health server at ``host:port``.

    Raises:
        ConfigError: `address` is not host:port.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"--health {address}: give host:port, as 127.0.0.1:9094")
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code().name
            problems = {
                "UNAVAILABLE": "nothing answers there",
                "DEADLINE_EXCEEDED": f"no answer within {timeout_s:g} s",
                "UNIMPLEMENTED": "the server there has no health service",
            }
            return Health(part, address, problems.get(code, code))
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return Health(part, address, "" if serving else "it reports that it is not serving")


def addresses(folder: Path) -> dict[str, str]:
    """Health server addresses by process, from the start files in a directory."""
    found = {}
    if (supernode := folder / SUPERNODE).is_file():
        options = tomllib.loads(supernode.read_text("utf-8"))
        found["supernode"] = str(options[_OPTION.removeprefix("--")])
    for script in sorted(folder.glob("start-*.sh")):
        words = script.read_text("utf-8").split()
        if _OPTION in words[:-1]:
            part = script.stem.removeprefix("start-")
            found[part] = words[words.index(_OPTION) + 1]
    return found
