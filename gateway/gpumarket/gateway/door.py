"""Who may come in: one of the keys, not more often than it may. The same for every protocol."""

from __future__ import annotations

from gpumarket.core.ports import Clock
from gpumarket.gateway.keys import Key, KeyFile
from gpumarket.gateway.problems import Problem
from gpumarket.gateway.rates import Rates


class Door:
    """Looks at the Authorization of each request."""

    def __init__(self, keys: KeyFile, clock: Clock) -> None:
        self._keys, self._clock = keys, clock
        self._rates = Rates()

    def known(self, authorization: str) -> Key:
        """Whose request it is. Raises Problem: 401, or 429 for who asks too often."""
        scheme, _, secret = authorization.partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Problem(401, "invalid_api_key", "this takes an API key of this gateway: Authorization: Bearer gm-...")
        wait = self._rates.wait_seconds(key.id, key.limits.per_minute, self._clock.monotonic())
        if wait:
            told = f"this key may ask {key.limits.per_minute} times a minute"
            raise Problem(429, "rate_limit_exceeded", told, again_seconds=wait)
        return key
