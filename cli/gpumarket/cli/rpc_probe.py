"""One JSON-RPC question to a chain, with the standard library: `doctor` must not need web3 to say that nothing answers."""

from __future__ import annotations

import json
import urllib.request

from gpumarket.core.errors import ConfigError, Unreachable

_SECONDS = 3.0


def chain_id(url: str) -> int:
    """The chain's id. Raises ConfigError for a URL that is none, Unreachable when nobody or something else answers."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not an http(s) URL", hint="set rpc_url in [chain], or GPUMARKET_CHAIN_RPC_URL")
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310  scheme checked above
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
            return int(json.load(answer)["result"], 16)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreachable(f"no chain answers at {url}: {error}", hint="gpumarket testnet up starts one") from error
