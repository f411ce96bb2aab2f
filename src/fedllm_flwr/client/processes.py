"""The processes of a client that share its local optimisation, each with its own base model.

The client's own process is the first. It starts the others before a round that needs them, sends
them the work of each round over private sockets, and ends them with itself: a process ends when its
socket is closed or its group has lost a member. None has a state to lose.
"""

import atexit
import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fedllm_flwr.client.optimisation import Optimisation
from fedllm_flwr.config import Config
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import FederationError, FedLLMError, first_line
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import check_devices, gpu_count, resolve_device, torch_threads
from fedllm_flwr.training.group import Group, PeerLost

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 5.0  # for a process that has failed to tell why
_SERVE = "from fedllm_flwr.client.processes import serve; serve({})"


@dataclass
class Processes:
    """The other processes of this client."""

    group: Group = field(default_factory=Group)
    _others: list[tuple[subprocess.Popen[bytes], Connection]] = field(default_factory=list)

    def start(self, config: Config) -> None:
        """Start ``federation.client_processes`` in all, unless they run; they load the base model.

        Raises:
            ConfigError: there are fewer devices.
            FederationError: a process has died, or is not ready in time.
            FedLLMError: a process cannot load the base model.
        """
        count, timeout_s = config.federation.client_processes, config.federation.round_timeout_s
        if count in (1, self.group.size):
            return
        self.end()
        check_devices(count, resolve_device(config.training.device))
        with self._ended_on_errors(config), tempfile.TemporaryDirectory() as folder:
            for rank in range(1, count):
                self._others.append(_started(rank, config))
                self._others[-1][1].send((rank, config, Path(folder)))
            self._wait(timeout_s)
            self.group = Group.connect(0, count, Path(folder), timeout_s)
            self._wait(timeout_s)

    @contextmanager
    def share(self, optimisation: Optimisation) -> Iterator[Optimisation]:
        """This process's share of an optimisation, while the others work on theirs.

        Raises:
            FederationError: a process has died, failed or not answered in time.
            OutOfMemoryError, FedLLMError: the error of a process.
        """
        config = optimisation.work.config
        if config.federation.client_processes == 1:
            yield optimisation
            return
        with self._ended_on_errors(config):
            for _, connection in self._others:
                connection.send(optimisation.without_model())
            yield optimisation.share(optimisation.work.model, self.group)
            self._wait(config.federation.round_timeout_s)

    def end(self) -> None:
        """End the other processes, whatever they do."""
        others, self._others = self._others, []
        self.group.close()
        self.group = Group()
        for process, connection in others:
            connection.close()
            process.kill()
            process.wait()

    def _wait(self, timeout_s: float) -> None:
        """Wait until every process says that it is done (None), or raise its error."""
        for _, connection in self._others:
            if not connection.poll(timeout_s):
                raise PeerLost
            if (error := connection.recv()) is not None:
                raise error

    @contextmanager
    def _ended_on_errors(self, config: Config) -> Iterator[None]:
        try:
            yield
        except (PeerLost, EOFError, ConnectionError, BlockingIOError) as error:
            reason = self._reason(config)
            self.end()
            raise reason from error
        except BaseException:
            self.end()
            raise

    def _reason(self, config: Config) -> Exception:
        """Why the group has lost a process: that one's error, its death, or its silence."""
        words = [_last_words(connection) for _, connection in self._others]
        for word in words:
            if word is not None and not isinstance(word, PeerLost):
                return word
        federation = config.federation
        asked = f"federation.client_processes={federation.client_processes}"
        for (process, _), word in zip(self._others, words, strict=True):
            if word is None and (status := _status(process)):  # those that lost a peer end with 0
                text = (
                    f"{asked}: one of the client's processes died (exit status {status}), out of "
                    "memory perhaps; lower training.micro_batch_size or federation.client_processes"
                )
                return FederationError(text, text)
        text = (
            f"{asked}: one of the client's processes was not ready within "
            f"federation.round_timeout_s={federation.round_timeout_s:g}; raise it, or set "
            "federation.client_processes=1"
        )
        return FederationError(text, text)


def _started(rank: int, config: Config) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that serves this one, which alone has the other end of its socket."""
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if resolve_device(config.training.device).type == "cuda":
        every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpu_count())))
        own["CUDA_VISIBLE_DEVICES"] = every.split(",")[rank]
    here, there = socket.socketpair()
    timeout = struct.pack("ll", int(config.federation.round_timeout_s) + 1, 0)  # seconds, us
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    with there:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE.format(there.fileno())],
            pass_fds=[there.fileno()],
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the client's
        )
    return process, Connection(here.detach())


def _last_words(connection: Connection) -> Exception | None:
    """The error that a process has sent, if it comes within some seconds."""
    with contextlib.suppress(EOFError, OSError):
        while connection.poll(_LAST_WORDS_S):
            if isinstance(error := connection.recv(), Exception):
                return error
    return None


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status of a process; None if it goes on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(_LAST_WORDS_S)
    return None


def serve(descriptor: int) -> None:
    """Work for the client at the other end of a socket, until it ends."""
    prepare_environment()
    with contextlib.suppress(EOFError, ConnectionError):  # the client has ended
        connection = Connection(descriptor)
        try:
            _work(connection)
        except (FedLLMError, PeerLost, torch.OutOfMemoryError) as error:
            connection.send(error)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            logger.exception("a process of the client failed")
            text = (
                f"one of the client's processes failed ({type(error).__name__}: "
                f"{first_line(error)}); its log, or federation.client_processes=1, says more"
            )
            connection.send(FederationError(text))
    os._exit(0)  # gloo's threads would abort an ordinary end


def _work(connection: Connection) -> None:
    rank, config, folder = connection.recv()
    federation = config.federation
    load_model(config)
    connection.send(None)
    group = Group.connect(rank, federation.client_processes, folder, federation.round_timeout_s)
    connection.send(None)
    while True:
        optimisation: Optimisation = connection.recv()
        config = optimisation.work.config
        with torch_threads(config.federation.threads_per_process):
            optimisation.share(load_model(config), group).run()
        connection.send(None)


processes = Processes()
atexit.register(processes.end)
