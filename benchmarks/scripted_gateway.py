"""A gateway and a scripted market as two processes of their own, for benchmarks that need a provider to do as told.

    python benchmarks/scripted_gateway.py market FOLDER            then lines on stdin: "hold", "go"
    python benchmarks/scripted_gateway.py gateway FOLDER JOBS_MAX  a gateway on that market

Each prints one line of JSON once it is up. The market is that of the tests (tests/sdk_market.py): scheduler and provider speak the
protocol, sign and verify, and compute nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import sdk_market  # noqa: E402
import sdk_models  # noqa: E402

from gpumarket.core.ports import SystemRandom  # noqa: E402
from gpumarket.core.units import Address, Hash  # noqa: E402
from gpumarket.gateway.app import App, serving  # noqa: E402
from gpumarket.gateway.daemon import opened  # noqa: E402
from gpumarket.gateway.keys import KeyFile, Limits  # noqa: E402
from gpumarket.gateway.settings import GatewaySettings  # noqa: E402
from gpumarket.sdk import Client, ClientSettings  # noqa: E402

WINDOW = 16


class _AnyChannel(dict[Hash, Any]):
    """Whatever channel is named is open and holds plenty: the client that opened it is another process."""

    def __missing__(self, channel: Hash) -> sdk_market.Channel:
        return sdk_market.Channel(channel, sdk_market.CLIENT.address, Address(bytes(20)), 10**27, 2**40)


async def market(folder: Path) -> None:
    """Serve until stdin ends; "hold" keeps every answer open after its twelfth token, "go" lets them end."""
    seller, go = sdk_market.FakeProvider("seller"), asyncio.Event()
    async with sdk_market.fake_market(folder, seller, window=WINDOW) as found:
        found.chain.channels = _AnyChannel()
        nodes = [[n.operator.hex(), n.owner.hex(), n.roles, n.tls_key_hash.hex(), n.endpoint] for n in found.chain.nodes.values()]
        print(json.dumps({"nodes": nodes}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line.strip() == "hold":
                seller.hold = go = asyncio.Event()
            else:
                go.set()
                seller.hold = None


async def gateway(folder: Path, jobs_max: int) -> None:
    """Serve until stdin ends."""
    chain = sdk_market.MemoryChain()
    for operator, owner, roles, key_hash, endpoint in json.loads((folder / "nodes.json").read_text()):
        node = sdk_market.Node(
            Address(bytes.fromhex(operator)),
            Address(bytes.fromhex(owner)),
            roles,
            tls_key_hash=Hash(bytes.fromhex(key_hash)),
            endpoint=endpoint,
        )
        chain.nodes[node.operator] = node
    settings = ClientSettings(state=folder / "client", lock_file=folder / "models.lock", check_probability=0.0, busy_seconds=60.0)
    client = Client(settings, key=sdk_market.CLIENT, chain=chain)
    own = GatewaySettings(state=folder / "gateway", listen="127.0.0.1:0", jobs_max=jobs_max)
    async with opened(own, client) as (room, door, _):
        await client.add_model("chat", sdk_models.CHAT.digest)
        _, secret = KeyFile(own.state).create("benchmark", Limits())
        async with serving(App(room, door, SystemRandom()), own.listen) as url:
            print(json.dumps({"url": f"{url}/v1/chat/completions", "key": secret, "pid": os.getpid()}), flush=True)
            await asyncio.to_thread(sys.stdin.read)


@dataclass(slots=True)
class Scripted:
    """Both, as processes. `url` takes chats of the model "chat"."""

    url: str
    key: str
    pid: int
    market: asyncio.subprocess.Process

    async def hold(self) -> None:
        await self._tell(b"hold\n")

    async def go(self) -> None:
        await self._tell(b"go\n")

    async def _tell(self, line: bytes) -> None:
        assert self.market.stdin is not None
        self.market.stdin.write(line)
        await self.market.stdin.drain()
        await asyncio.sleep(0.2)  # it is read


@asynccontextmanager
async def scripted(folder: Path, jobs_max: int) -> AsyncIterator[Scripted]:
    """Both processes while inside."""
    async with _child("market", str(folder)) as (seller, told):
        (folder / "nodes.json").write_text(json.dumps(told["nodes"]))
        async with _child("gateway", str(folder), str(jobs_max)) as (_, ready):
            yield Scripted(ready["url"], ready["key"], ready["pid"], seller)


@asynccontextmanager
async def _child(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments, **pipes)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, json.loads(await process.stdout.readline())
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()


def main(arguments: list[str]) -> None:
    kind, folder, *more = arguments
    asyncio.run(market(Path(folder)) if kind == "market" else gateway(Path(folder), int(more[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
