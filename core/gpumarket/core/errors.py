"""Everything that can go wrong, as one tree. The branch tells whose fault it is, which in a market is who pays.

    GpumarketError                     exit code
    ├── ConfigError                    3   yours: settings, files, extras
    │   ├── InvalidRequest                 what was asked of a model: no prompt, a parameter out of its range
    │   ├── MissingExtra                   a command whose optional packages are not installed
    │   ├── PortInUse
    │   ├── StateLocked                    another process works on this state folder
    │   ├── JobIdReused                    another request was made under this job id
    │   └── NotDisputable                  drawn from the client's own seed: no ground for slashing
    ├── WalletError                    4   yours: wallet keys
    │   ├── WrongPassword
    │   └── KeyFileExposed
    ├── BadSignature                   4   the peer's: a statement is not signed by whom it names
    ├── FundsError                     5   yours: money is missing
    │   ├── OutOfFunds
    │   ├── OverMaxCost                    the quote is over the limit you set
    │   ├── SpendLimitReached              the day's cap; says when it frees
    │   └── ChannelExpiring
    ├── NetworkError                   6   nobody's: something between
    │   ├── Unreachable
    │   ├── P2PUnavailable
    │   └── ChainError
    │       ├── WrongChain                 another chain id, or other code at a contract's address
    │       ├── InconsistentChain          an endpoint contradicts itself or another one: nothing is taken from it
    │       └── TransactionFailed          reverted, with the contract's named error
    ├── MatchError                     7   the market's
    │   ├── NoProvider                     which filter removed how many
    │   ├── UnknownModel
    │   └── Busy                           a queue is full; retry_after tells when to come back
    ├── VerificationError              8   the peer's: it broke a promise
    │   ├── BadReceipt
    │   ├── BadProof                       a GPU proof does not hold
    │   └── ResultRejected                 checked and refused; not paid
    ├── ProtocolError                  8   the peer's: a message that the protocol does not allow here
    ├── JobFailed                      1   the job ended without a result
    ├── EngineFailed                   1   the provider's own engine
    └── JournalError                   1   ours: the ledger refuses, or its disk does

Every message says what happened and why; `hint` is the next command or step.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Fault(enum.Enum):
    """Whose fault an error is; reputation and payment follow it."""

    USER = "user"
    LOCAL = "local"
    PEER = "peer"
    NETWORK = "network"


class GpumarketError(Exception):
    """Root of the tree. `code` is stable and machine readable; `retryable` means the same call may succeed later."""

    code = "error"
    exit_code = 1
    fault = Fault.LOCAL
    retryable = False

    def __init__(self, message: str, *, hint: str = "", retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if retryable is not None:
            self.retryable = retryable

    def as_dict(self) -> dict[str, object]:
        """The documented JSON shape {code, message, hint, retryable}."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "retryable": self.retryable}


class ConfigError(GpumarketError):
    code, exit_code, fault = "config", 3, Fault.USER


class InvalidRequest(ConfigError):
    """A request that no provider should get. `param` names the parameter at fault."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param = param


class MissingExtra(ConfigError):
    code = "missing_extra"

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs packages that are not installed", hint=f"pip install 'gpumarket[{extra}]'")
        self.extra = extra


class PortInUse(ConfigError):
    code = "port_in_use"


class StateLocked(ConfigError):
    code = "state_locked"


class JobIdReused(ConfigError):
    code = "job_id_reused"


class NotDisputable(ConfigError):
    code = "not_disputable"


class WalletError(GpumarketError):
    code, exit_code, fault = "key", 4, Fault.USER


class WrongPassword(WalletError):
    code = "wrong_password"


class KeyFileExposed(WalletError):
    code = "key_file_exposed"


class BadSignature(GpumarketError):
    code, exit_code, fault = "bad_signature", 4, Fault.PEER


class FundsError(GpumarketError):
    code, exit_code, fault = "funds", 5, Fault.USER


class OutOfFunds(FundsError):
    code = "out_of_funds"


class OverMaxCost(FundsError):
    code = "over_max_cost"


class SpendLimitReached(FundsError):
    code = "spend_limit"


class ChannelExpiring(FundsError):
    code = "channel_expiring"


class NetworkError(GpumarketError):
    code, exit_code, fault, retryable = "network", 6, Fault.NETWORK, True


class Unreachable(NetworkError):
    code = "unreachable"


class P2PUnavailable(NetworkError):
    code = "p2p_unavailable"


class ChainError(NetworkError):
    code = "chain"


class WrongChain(ChainError):
    code, retryable = "wrong_chain", False


class InconsistentChain(ChainError):
    code = "inconsistent_chain"


class TransactionFailed(ChainError):
    code, retryable = "transaction_failed", False


class MatchError(GpumarketError):
    code, exit_code, fault = "match", 7, Fault.NETWORK


class NoProvider(MatchError):
    """No provider passes the hard filters. `removed` maps a filter's name to how many it removed."""

    code, retryable = "no_provider", True

    def __init__(self, message: str, *, removed: Mapping[str, int] | None = None, considered: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.removed = dict(removed or {})
        self.considered = considered


class UnknownModel(MatchError):
    code, fault = "unknown_model", Fault.USER


class Busy(MatchError):
    code, retryable = "busy", True

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds


class VerificationError(GpumarketError):
    code, exit_code, fault = "verification", 8, Fault.PEER


class BadReceipt(VerificationError):
    code = "bad_receipt"


class BadProof(VerificationError):
    code = "bad_proof"


class ResultRejected(VerificationError):
    code = "result_rejected"


class ProtocolError(GpumarketError):
    code, exit_code, fault = "protocol", 8, Fault.PEER


class JobFailed(GpumarketError):
    code, fault = "job_failed", Fault.NETWORK


class EngineFailed(GpumarketError):
    code, fault, retryable = "engine_failed", Fault.LOCAL, True


class JournalError(GpumarketError):
    code, fault = "journal", Fault.LOCAL


def by_code() -> dict[str, type[GpumarketError]]:
    """Every class of this module by its code: an error crosses the wire and comes back as itself. What others derive stays at home."""
    found: dict[str, type[GpumarketError]] = {}
    todo: list[type[GpumarketError]] = [GpumarketError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.code, cls)
        todo.extend(below for below in cls.__subclasses__() if below.__module__ == __name__)
    return found
