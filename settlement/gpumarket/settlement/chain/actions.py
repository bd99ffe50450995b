"""What a party does on chain, one method per contract function, through the sender.

Amounts are base units, times unix seconds, signatures 65 bytes r | s | v. Each method returns when its transaction is mined;
`open_channel` waits for the confirmations, because money decisions follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpumarket.core.errors import ChainError
from gpumarket.core.signing import compact
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.sender import Sender, TransactionReceipt

_ENOUGH = 2**255
"""An allowance above this counts as unlimited."""
APPROVE_GAS, STAKE_GAS, REGISTER_GAS = 80_000, 180_000, 400_000
"""Limits for calls that are sent before what they depend on is mined (measured use is well below)."""


class Actions:
    """The market's contract calls for the sender's account."""

    def __init__(self, chain: Chain, sender: Sender) -> None:
        self.chain, self.sender = chain, sender

    # --- token -------------------------------------------------------------------------------------------------------------

    async def faucet(self) -> TransactionReceipt:
        """Mint the test token's fixed amount to this account (local test networks only)."""
        return await self.sender.send("faucet", self.chain.token.functions.faucet(self._me()))

    async def approve(self) -> list[TransactionReceipt]:
        """Let the channels and the registry pull this account's tokens; only where the allowance is not unlimited yet."""
        wanted = []
        for contract in (self.chain.channels, self.chain.registry):
            with reachable(self.chain.settings.rpc_url):
                allowance = await self.chain.token.functions.allowance(self._me(), contract.address).call()
            if allowance < _ENOUGH:
                wanted.append(("approve", self.chain.token.functions.approve(contract.address, 2**256 - 1), APPROVE_GAS))
        return await self.sender.send_all(wanted) if wanted else []

    async def balance(self, address: Address | None = None) -> Money:
        """Tokens of an account (this one's by default)."""
        with reachable(self.chain.settings.rpc_url):
            return Money(await self.chain.token.functions.balanceOf(self._hex(address or self.sender.address)).call())

    async def gas_balance(self, address: Address | None = None) -> int:
        """Wei of an account (this one's by default)."""
        with reachable(self.chain.settings.rpc_url):
            return int(await self.chain.w3.eth.get_balance(self._hex(address or self.sender.address)))

    # --- registry ----------------------------------------------------------------------------------------------------------

    async def register(
        self, roles: int, p2p_id: str, tls_key_hash: Hash, endpoint: str, owner: Address | None = None
    ) -> TransactionReceipt:
        """Register this account as a node, or update what it published; `owner` is who owns its stake, where that is not itself."""
        registry = self.chain.registry.functions
        if owner is None:
            return await self.sender.send("register", registry.register(roles, p2p_id, tls_key_hash, endpoint))
        return await self.sender.send("register", registry.registerWithOwner(self._hex(owner), roles, p2p_id, tls_key_hash, endpoint))

    async def approve_operator(self, operator: Address, approved: bool) -> TransactionReceipt:
        """As an owner: agree, or no longer agree, to stand behind an operator that has not registered yet."""
        return await self.sender.send("approve operator", self.chain.registry.functions.approveOperator(self._hex(operator), approved))

    async def approves(self, owner: Address, operator: Address) -> bool:
        """Whether an owner has agreed to stand behind an operator."""
        with reachable(self.chain.settings.rpc_url):
            return bool(await self.chain.registry.functions.approvedOperator(self._hex(owner), self._hex(operator)).call())

    async def stake(self, amount: int, operator: Address | None = None) -> TransactionReceipt:
        """Add to the stake of a node (this account's own by default), for its owner; `approve` comes first."""
        return await self.sender.send("stake", self.chain.registry.functions.stake(self._hex(operator or self.sender.address), amount))

    async def begin_unbond(self, operator: Address, amount: int) -> TransactionReceipt:
        """As a node's owner: start taking stake out; the delay counts anew for all that is unbonding."""
        return await self.sender.send("begin unbond", self.chain.registry.functions.beginUnbond(self._hex(operator), amount))

    async def withdraw_stake(self, operator: Address) -> TransactionReceipt:
        """As a node's owner: take out what has finished unbonding and no dispute holds."""
        return await self.sender.send("withdraw stake", self.chain.registry.functions.withdraw(self._hex(operator)))

    async def register_and_stake(self, roles: int, p2p_id: str, tls_key_hash: Hash, endpoint: str, amount: int) -> None:
        """Approve, register and stake in consecutive transactions that are awaited once."""
        registry, token = self.chain.registry, self.chain.token
        await self.sender.send_all(
            [
                ("approve", token.functions.approve(registry.address, 2**256 - 1), APPROVE_GAS),
                ("register", registry.functions.register(roles, p2p_id, tls_key_hash, endpoint), REGISTER_GAS),
                ("stake", registry.functions.stake(self._me(), amount), STAKE_GAS),
            ]
        )

    async def deregister(self) -> TransactionReceipt:
        """Stop offering. Stake stays until the owner unbonds it."""
        return await self.sender.send("deregister", self.chain.registry.functions.deregister())

    # --- channels ----------------------------------------------------------------------------------------------------------

    async def open_channel(
        self, payee: Address, amount: int, expires_at: int, signer: Address | None = None, *, label: str | None = None
    ) -> Hash:
        """Open a channel and return its id after the confirmations; `approve` comes first.

        With a `label` of the caller's own, a second call with it (also after a restart) opens no second channel but returns the first's id.
        """
        call = self.chain.channels.functions.open(self._hex(payee), self._hex(signer or self.sender.address), amount, expires_at)
        receipt = await self.sender.send(label or "open channel", call, once=label is not None)
        receipt = await self.sender.confirmed(receipt)
        return Hash(bytes(self._event("Opened", receipt)[0]["args"]["id"]))

    async def top_up(self, channel: Hash, amount: int, expires_at: int) -> TransactionReceipt:
        """Add to a channel of ours, extend it to `expires_at`, or both."""
        return await self.sender.send("top up", self.chain.channels.functions.topUp(channel, amount, expires_at))

    async def redeem(self, channel: Hash, cumulative: int, signature: bytes) -> TransactionReceipt:
        """Redeem one voucher; its payee is paid directly."""
        return await self.sender.send("redeem", self.chain.channels.functions.redeem(channel, cumulative, signature))

    async def redeem_many(self, vouchers: Sequence[tuple[Hash, int, bytes]]) -> TransactionReceipt:
        """Redeem (channel, cumulative, signature) of many channels to their payees' credited balances. Bad items are skipped by the
        contract (`skipped` tells which); `withdraw` pays the balance out."""
        claims = [(channel, cumulative, *compact(signature)) for channel, cumulative, signature in vouchers]
        return await self.sender.send("redeem many", self.chain.channels.functions.redeemMany(claims))

    async def push(self, payments: Sequence[tuple[Hash, int]]) -> TransactionReceipt:
        """Advance (channel, cumulative) of channels that this account signs for. Counts as a signed voucher: advance the guard first."""
        ids, cumulatives = [p[0] for p in payments], [p[1] for p in payments]
        return await self.sender.send("push", self.chain.channels.functions.push(ids, cumulatives))

    async def request_close(self, channel: Hash) -> TransactionReceipt:
        """Announce the close of a channel of ours: the payee's window to redeem begins. Never sent twice, also after a restart."""
        call = self.chain.channels.functions.requestClose(channel)
        return await self.sender.send(f"request close {hex0x(channel)}", call, once=True)

    async def close(self, channel: Hash) -> TransactionReceipt:
        """Close a channel of ours after its window or its expiry; the rest comes back. Never sent twice, also after a restart."""
        return await self.sender.send(f"close {hex0x(channel)}", self.chain.channels.functions.close(channel), once=True)

    async def cooperative_close(self, channel: Hash, cumulative: int, payee_signature: bytes) -> TransactionReceipt:
        """Close a channel of ours at once with the payee's consent to `cumulative`. Never sent twice, also after a restart."""
        call = self.chain.channels.functions.cooperativeClose(channel, cumulative, payee_signature)
        return await self.sender.send(f"cooperative close {hex0x(channel)}", call, once=True)

    async def withdraw(self, to: Address | None = None) -> TransactionReceipt:
        """Pay out what batches credited to this account."""
        return await self.sender.send("withdraw", self.chain.channels.functions.withdraw(self._hex(to or self.sender.address)))

    async def credited(self, address: Address | None = None) -> Money:
        """What batches credited to an account (this one's by default) and it has not withdrawn."""
        with reachable(self.chain.settings.rpc_url):
            return Money(await self.chain.channels.functions.credited(self._hex(address or self.sender.address)).call())

    # --- reading receipts --------------------------------------------------------------------------------------------------

    def redeemed(self, receipt: TransactionReceipt) -> dict[Hash, int]:
        """Amount that each channel paid in this transaction."""
        paid: dict[Hash, int] = {}
        for event in self._events("Redeemed", receipt):
            channel = Hash(bytes(event["args"]["id"]))
            paid[channel] = paid.get(channel, 0) + int(event["args"]["amount"])
        return paid

    def closes_at(self, receipt: TransactionReceipt) -> int:
        """From when on a channel can be closed whose close was asked for in this transaction, unix seconds."""
        return int(self._event("CloseRequested", receipt)[0]["args"]["closesAt"])

    def refunded(self, receipt: TransactionReceipt) -> Money:
        """What the closes of this transaction brought back."""
        return Money(sum(int(event["args"]["refunded"]) for event in self._events("Closed", receipt)))

    def skipped(self, receipt: TransactionReceipt) -> list[Hash]:
        """Channels that a batch left out."""
        return [Hash(bytes(event["args"]["id"])) for event in self._events("ClaimSkipped", receipt)]

    def _event(self, name: str, receipt: TransactionReceipt) -> list[Any]:
        found = self._events(name, receipt)
        if not found:
            raise ChainError(f"transaction 0x{receipt.tx_hash.hex()} holds no {name} event", retryable=False)
        return found

    def _events(self, name: str, receipt: TransactionReceipt) -> list[Any]:
        from eth_utils.abi import event_abi_to_log_topic

        event = self.chain.channels.events[name]()
        topic = event_abi_to_log_topic(event.abi)
        ours = [log for log in receipt.logs if log["address"] == self.chain.channels.address]
        return [event.process_log(log) for log in ours if bytes(log["topics"][0]) == topic]

    def _hex(self, address: Address) -> Any:
        return self.chain.w3.to_checksum_address(address)

    def _me(self) -> Any:
        return self._hex(self.sender.address)
