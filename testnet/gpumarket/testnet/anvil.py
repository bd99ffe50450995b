"""anvil, the local chain, as a child process: started, killed, restarted from its state.

Invariant: it listens on loopback only and dies with the process that started it (PR_SET_PDEATHSIG, set by a tiny launcher so that no code
runs between fork and exec). It must never hold value: its keys are the public test mnemonic.

Everything here is synchronous; from asyncio use `asyncio.to_thread`, whose threads live as long as the loop: the kernel's death signal
follows the thread that started the child.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from gpumarket.core.errors import ChainError, ConfigError, PortInUse
from gpumarket.testnet.anvil_install import ANVIL_VERSION, ensure_anvil

__all__ = ["ANVIL_VERSION", "DEV_MNEMONIC", "Anvil", "ensure_anvil"]

DEV_MNEMONIC = "test test test test test test test test test test test junk"
"""The public mnemonic of every local Ethereum chain; its accounts hold play money only."""
FUNDED_WEI = 10_000 * 10**18
READY_SECONDS = 20.0
STOP_SECONDS = 10.0
_PORT_TRIES = 5
_LAUNCHER = """
import ctypes, os, signal, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; SIGTERM, so that the state is written
if os.getppid() != parent:
    sys.exit(1)  # the parent died before the signal was set
os.execv(argv[0], argv)
"""


class Anvil:
    """One chain. Make it with `Anvil.start`; use it as a context manager to have it stopped."""

    def __init__(self, argv: Sequence[str], host: str, port: int, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._argv = tuple(argv)
        self.host = host
        self.port = port
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        *,
        port: int = 0,
        state: Path | None = None,
        block_time: float | None = 1,
        chain_id: int = 31337,
        host: str = "127.0.0.1",
        accounts: int = 10,
        funded: Sequence[str] = (),
        gas_limit: int = 60_000_000,
        binary: Path | None = None,
    ) -> Self:
        """Start a chain and wait until it answers.

        `port` 0 takes a free one. With `state` the chain is read from that file, if it exists, and written to it every second and at the
        end. `block_time` in seconds; None mines each transaction at once. `accounts` of the test mnemonic hold 10,000 ether each, and so
        does every address in `funded`. Raises PortInUse, ConfigError (a state file that anvil refuses) or ChainError.
        """
        _check_loopback(host)
        argv = [str(binary or ensure_anvil()), "--quiet", "--host", host, "--chain-id", str(chain_id)]
        argv += ["--accounts", str(accounts), "--mnemonic", DEV_MNEMONIC, "--gas-limit", str(gas_limit)]
        if block_time is not None:
            argv += ["--block-time", str(block_time)]
        if state is not None:
            state.parent.mkdir(parents=True, exist_ok=True)
            argv += ["--state", str(state.resolve()), "--state-interval", "1"]
        for left in reversed(range(_PORT_TRIES)):
            folder = tempfile.TemporaryDirectory(prefix="gpumarket-anvil-")
            anvil = cls(argv, host, port or _free_port(host), folder)
            try:
                anvil._launch()
                break
            except PortInUse:  # somebody took the free port first: choose again
                if port or not left:
                    raise
        for address in funded:
            anvil.rpc("anvil_setBalance", address, hex(FUNDED_WEI))
        return anvil

    @property
    def url(self) -> str:
        """HTTP JSON-RPC address; the same port serves WebSocket."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id. Raises ChainError when it does not run."""
        if self._process is None or self._process.poll() is not None:
            raise ChainError("the local chain does not run", hint="start it again with restart()")
        return self._process.pid

    def rpc(self, method: str, *params: Any) -> Any:
        """One JSON-RPC call. Raises ChainError with the chain's own message."""
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request("POST", "/", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChainError(f"the local chain at {self.url} does not answer: {error}") from error
        finally:
            connection.close()
        if "error" in answer:
            raise ChainError(f"{method}: {answer['error'].get('message', answer['error'])}", retryable=False)
        return answer["result"]

    def stop(self) -> None:
        """End it, writing its state first if it has a file. Does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End it as a crash would: what was not written within the last second is lost."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart(self) -> None:
        """Start again on the same port with the same arguments, from the state file if there is one."""
        self.stop()
        self._launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def _launch(self) -> None:
        _check_port(self.host, self.port)
        errors = Path(self._folder.name) / "stderr"
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self._argv, "--port", str(self.port)]
        with errors.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=sink,
                env={"PATH": os.defpath, "HOME": self._folder.name},  # it keeps old states under HOME
                start_new_session=True,  # Ctrl-C goes to whoever started us, which then stops the chain in order
            )
        try:
            self._await_ready(errors)
        except BaseException:
            self.kill()
            raise

    def _await_ready(self, errors: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise _start_failure(code, errors.read_text(errors="replace").strip(), self.host, self.port)
            with contextlib.suppress(ChainError):  # not listening yet
                self.rpc("eth_chainId")
                if self._process.poll() is None:  # else a stranger on that port answered
                    return
            time.sleep(0.02)
        raise ChainError(f"the local chain did not answer within {READY_SECONDS:.0f} s", hint="the machine may be overloaded: try again")


def _check_loopback(host: str) -> None:
    if host != "localhost" and not host.startswith("127."):
        raise ConfigError(f"the local chain may not listen on {host}: its keys are public", hint="use 127.0.0.1")


def _check_port(host: str, port: int) -> None:
    """Before the launch, else whoever listens there would answer in our chain's place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _port_in_use(host, port) from error


def _port_in_use(host: str, port: int) -> PortInUse:
    why = f"port {port} on {host} cannot be listened on, so the local chain cannot start there"
    return PortInUse(why, hint="choose another port, or 0 for a free one")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _start_failure(code: int, said: str, host: str, port: int) -> Exception:
    if "in use" in said:
        return _port_in_use(host, port)
    if "--state" in said:
        return ConfigError(f"anvil refuses its state file: {said[:300]}", hint="move the file away to begin a new chain")
    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return ChainError(f"anvil ended at once ({reason}): {said[:300] or 'it said nothing'}")
