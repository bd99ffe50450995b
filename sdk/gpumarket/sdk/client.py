"""The client: `async with Client.from_env() as market`.

    vectors = await market.embed("all-MiniLM-L6-v2", ["a red fox", "ein roter Fuchs"], max_cost="0.01")
    async for piece in market.chat("tiny-llama", "Say hello", stream=True): ...

Every call quotes first, journals before it sends, and returns a result with receipt, verdict and cost. One client per state folder and
process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

from numpy.typing import ArrayLike

from gpumarket.core.errors import ConfigError, Unreachable
from gpumarket.core.ports import Clock, Random, SystemClock, SystemRandom
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.signing import LocalKey
from gpumarket.core.tensors import Signature
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money, parse_hash
from gpumarket.sdk import disputes, jobs, money, offers, ordering, outcomes, receipt_files, resuming, store
from gpumarket.sdk.buying import Bought, Purchase
from gpumarket.sdk.chain_port import ChainPort
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.dispute_view import DisputeView
from gpumarket.sdk.job_ids import job_id_of
from gpumarket.sdk.lock import LockedModel, find, read_lock
from gpumarket.sdk.model_files import LoadedModel
from gpumarket.sdk.models import Models
from gpumarket.sdk.opening import open_desk
from gpumarket.sdk.options import Amount, ChatOptions, Messages, TextOptions, amount_of
from gpumarket.sdk.requests import Body, Inputs, Sampling, Tokens, chat_body, completion_body, embed_body, is_one, warnings_to_json
from gpumarket.sdk.results import AccountView, ChatResult, EmbedResult, InferResult, JobResult, JobSummary, OfferView, Quote, Spent
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.stopping import stop_strings
from gpumarket.sdk.streaming import ChatStream
from gpumarket.sdk.tensors import tensor_body
from gpumarket.sdk.texts import TextOrder
from gpumarket.sdk.tokens import TextCodec
from gpumarket.settlement.verification import profile_for
from gpumarket.v1 import market_pb2 as mpb

CONFIG_VARIABLE = "GPUMARKET_CONFIG"
"""Variable that names the TOML file."""
Asked = Inputs | Mapping[str, ArrayLike]
"""A prompt, texts or token ids to embed, or arrays by input name."""
BodyOf = Callable[[LoadedModel, Sampling], Body]
_NO_CONSTRAINTS = Constraints()


class Client:
    """A wallet on the market. Use it as an async context manager."""

    def __init__(
        self,
        settings: ClientSettings | None = None,
        chain_settings: ChainSettings | None = None,
        *,
        password: str | None = None,
        key: LocalKey | None = None,
        owner_key: LocalKey | None = None,
        chain: ChainPort | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        """`key` replaces the key file and its password; `owner_key` is for deposits and closes where the settings name an owner; `chain`
        replaces a chain connection of the client's own."""
        self._owner_key = owner_key
        self.settings = settings or ClientSettings()
        self._chain_settings = chain_settings or ChainSettings()
        self._password, self._key, self._chain = password, key, chain
        self._clock, self._random = clock or SystemClock(), random or SystemRandom()
        self._stack = AsyncExitStack()
        self._desk: Desk | None = None
        self._models: Models | None = None

    @classmethod
    def from_env(cls, *, config: Path | None = None, password: str | None = None, **flags: Any) -> Self:
        """Settings from `flags`, GPUMARKET_CLIENT_* and GPUMARKET_CHAIN_* variables, and the TOML file (`config`, or GPUMARKET_CONFIG)."""
        file = config or (Path(os.environ[CONFIG_VARIABLE]) if CONFIG_VARIABLE in os.environ else None)
        return cls(load(ClientSettings, file=file, flags=flags), load(ChainSettings, file=file), password=password)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._desk = await open_desk(
                stack,
                self.settings,
                self._chain_settings,
                self._key or _unlocked(self.settings, self._password),
                self._clock,
                self._random,
                owner_key=self._owner_key,
                chain=self._chain,
            )
            self._models = Models(self._desk)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._desk = None
        await self._stack.aclose()

    # --- buying ------------------------------------------------------------------------------------------------------------

    async def embed(
        self,
        model: str,
        inputs: Inputs,
        *,
        max_cost: Amount = None,
        constraints: Constraints = _NO_CONSTRAINTS,
        explain: bool = False,
        job_id: bytes | None = None,
        approve: ordering.Approve | None = None,
    ) -> EmbedResult:
        """Embed texts, or lists of token ids, which go out as they are: no special token is added, and none too many is cut. `job_id` as in
        TextOptions. Raises OverMaxCost before anything is sent when the quote is above `max_cost`; ConfigError for ids that the model does
        not have; UnknownModel, NoProvider, JobFailed, ResultRejected."""
        result = await self._rows(model, Task.EMBED, lambda m: embed_body(m, inputs), max_cost, constraints, explain, job_id, approve)
        assert isinstance(result, EmbedResult)
        return result

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        outputs: Sequence[str] | None = None,
        max_cost: Amount = None,
        constraints: Constraints = _NO_CONSTRAINTS,
        explain: bool = False,
        job_id: bytes | None = None,
        approve: ordering.Approve | None = None,
    ) -> InferResult:
        """Tensors through a model: arrays by input name, each with the rows of the request along its first dimension. `outputs` are the
        wanted ones, all by default. Raises InvalidRequest for arrays that do not fit the model's `signature`; else as `embed`."""
        result = await self._rows(
            model, Task.INFER, lambda m: tensor_body(m, inputs, outputs), max_cost, constraints, explain, job_id, approve
        )
        assert isinstance(result, InferResult)
        return result

    @overload
    def chat(self, model: str, prompt: str | None = None, *, stream: Literal[True], **options: Unpack[ChatOptions]) -> ChatStream: ...

    @overload
    def chat(
        self, model: str, prompt: str | None = None, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> Coroutine[Any, Any, ChatResult]: ...

    def chat(
        self, model: str, prompt: str | None = None, *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> ChatStream | Coroutine[Any, Any, ChatResult]:
        """Answer a prompt or a conversation (`messages`), rendered with the model's own chat template.

        With `stream`, an async iterator of text pieces; else to be awaited. Errors as `embed`.
        """
        talk = _conversation(prompt, options.get("messages"))
        return self._text(model, lambda m, s: chat_body(m, talk, s), stream, options)

    @overload
    def complete(self, model: str, prompt: str | Tokens, *, stream: Literal[True], **options: Unpack[TextOptions]) -> ChatStream: ...

    @overload
    def complete(
        self, model: str, prompt: str | Tokens, *, stream: Literal[False] = False, **options: Unpack[TextOptions]
    ) -> Coroutine[Any, Any, ChatResult]: ...

    def complete(
        self, model: str, prompt: str | Tokens, *, stream: bool = False, **options: Unpack[TextOptions]
    ) -> ChatStream | Coroutine[Any, Any, ChatResult]:
        """Continue a raw prompt, without a chat template; token ids go out as they are. Otherwise as `chat`."""
        return self._text(model, lambda m, s: completion_body(m, prompt, s), stream, options)

    async def quote(self, model: str, inputs: Asked, *, max_tokens: int = 256, constraints: Constraints = _NO_CONSTRAINTS) -> Quote:
        """What `embed` or `infer` of these inputs, `chat` with this prompt or `complete` of these token ids would cost at most now. Nothing
        is reserved or stored."""
        ask = await self._preview(model, inputs, max_tokens, constraints)
        return await self.desk.schedulers.ask(lambda hub: ordering.quote(self.desk, hub, ask))

    async def explain(
        self, model: str, inputs: Asked, *, max_tokens: int = 256, constraints: Constraints = _NO_CONSTRAINTS
    ) -> mpb.Explanation:
        """Why such a job would go where it goes: the drawn candidates' scores, how many each filter removed, some of them with numbers."""
        ask = await self._preview(model, inputs, max_tokens, constraints)
        return await self.desk.schedulers.ask(lambda hub: hub.explain(ordering.explained_order(self.desk, hub, ask)))

    # --- jobs --------------------------------------------------------------------------------------------------------------

    def jobs(self, *, checks: bool = False) -> list[JobSummary]:
        """Jobs of this journal, newest first; with `checks` also those bought to check others."""
        return jobs.summaries(self.desk, checks=checks)

    def spent(self, job: Hash | str) -> Spent | None:
        """What a job cost until now, its checks and reruns included; None for one that this journal does not have."""
        return jobs.spent(self.desk, parse_hash(job) if isinstance(job, str) else job)

    async def resume(self, job: Hash | str) -> JobResult:
        """Bring an interrupted job to its end, or read the result of one that has it. Raises JobFailed or ResultRejected."""
        key = parse_hash(job) if isinstance(job, str) else job
        bought = await resuming.resume(self.desk, key)
        return outcomes.build(self.desk, bought, await self._codec(bought))

    async def resume_all(self) -> list[JobResult | Exception]:
        """Resume every interrupted job; a job that ends without a result is in the list as its error, and so is one whose scheduler, not
        the one that orders go to now, does not answer: it stays to be resumed."""
        found: list[JobResult | Exception] = []
        silent: dict[Address, Unreachable] = {}
        for key in self.desk.journal.read(lambda c: store.job_keys(c, (*store.RUNNING, "delivered"), ("user", "rerun"))):
            scheduler = self.desk.journal.read(partial(store.scheduler_of, job=key))
            try:
                if scheduler in silent:
                    raise silent[scheduler]
                found.append(await self.resume(key))
            except jobs.ENDED as error:
                found.append(error)
            except Unreachable as error:
                if scheduler == self.desk.hub.address:
                    raise
                silent[scheduler] = error
                found.append(error)
        return found

    def save_receipt(self, job: Hash | str, path: Path, *, content: bool = False) -> None:
        """Write a job's signed statements to a new file (0600), for `gpumarket receipt verify`. With `content` also request and output."""
        receipt_files.save(self.desk.journal, self.desk.domain, job, path, content=content)

    async def dispute(self, job: Hash | str, *, wait: bool = True, on_change: Callable[[DisputeView], None] | None = None) -> DisputeView:
        """Take the provider of a rejected result before a panel, or go on with that; `wait`: to its end, else till all five are served."""
        return await disputes.pursue(self.desk, parse_hash(job) if isinstance(job, str) else job, wait=wait, on_change=on_change)

    async def disputes(self) -> list[DisputeView]:
        """Disputes of this journal as the chain has them now, newest first."""
        return await disputes.views(self.desk)

    # --- market and models -------------------------------------------------------------------------------------------------

    async def offers(self, model: str | Hash | None = None) -> list[OfferView]:
        """What is on sale: of one model (alias or digest), or everything the scheduler knows."""
        digest = find(self.settings.lock_file, model).digest if isinstance(model, str) else model
        return await self.desk.schedulers.ask(lambda hub: offers.views(self.desk, hub, digest))

    def models(self) -> list[LockedModel]:
        """Entries of the lock file, by name."""
        return [entry for _, entry in sorted(read_lock(self.settings.lock_file).items())]

    async def signature(self, model: str) -> Signature:
        """What a tensor model takes and gives, from its verified files. Raises UnknownModel, ConfigError."""
        return (await self._models_.load(model, Task.INFER)).files.signature

    async def add_model(self, name: str, digest: Hash | str) -> LockedModel:
        """Put a model into the lock file, its tokenizer fetched and verified against the digest. Raises UnknownModel."""
        return await self._models_.add(name, parse_hash(digest) if isinstance(digest, str) else digest)

    # --- money -------------------------------------------------------------------------------------------------------------

    async def account(self) -> AccountView:
        """Wallet and channel, by our books and by the scheduler's."""
        return await money.view(self.desk)

    async def deposit(self, amount: Amount) -> AccountView:
        """Add to the channel's deposit (opens the channel where there is none)."""
        value = amount_of(amount)
        if not value:
            raise ConfigError("a deposit must be more than 0")
        await money.deposit(self.desk, value)
        return await money.view(self.desk)

    async def close_channel(self) -> Money:
        """Close the channel at what was used, with the scheduler's consent; what came back. Raises ProtocolError when it bills too much."""
        return await money.close(self.desk)

    @property
    def address(self) -> Address:
        """The wallet's address."""
        return self.desk.signer.address

    @property
    def desk(self) -> Desk:
        """The client's parts, for the command line and the gateway. Raises ConfigError outside `async with`."""
        if self._desk is None:
            raise ConfigError("this client is not open", hint="use it as: async with Client.from_env() as market")
        return self._desk

    # --- inside ------------------------------------------------------------------------------------------------------------

    @property
    def _models_(self) -> Models:
        if self._models is None:
            raise ConfigError("this client is not open", hint="use it as: async with Client.from_env() as market")
        return self._models

    def _ask(self, loaded: LoadedModel, body: Body, max_cost: Amount, constraints: Constraints, explain: bool) -> ordering.Ask:
        entry = loaded.entry
        profile = profile_for(entry.task, entry.dtype).digest
        allowed = self.settings.accepted_profiles
        if allowed and profile not in allowed:
            raise ConfigError(
                f"model {entry.name} is judged by profile 0x{profile.hex()}, which your settings do not accept",
                hint="GPUMARKET_CLIENT_PROFILES",
            )
        limit = amount_of(max_cost)
        options = {"warnings": warnings_to_json(body.warnings), "max_cost": None if limit is None else str(limit)}
        return ordering.Ask(
            alias=entry.name,
            model=entry.digest,
            task=entry.task,
            request=body.request,
            units=body.units,
            output_units=body.output_units,
            profile=profile,
            max_cost=limit,
            constraints=constraints.to_proto(self.desk.pool.distrusted(profile)),
            options=options,
            explain=explain,
        )

    async def _rows(
        self,
        model: str,
        task: Task,
        body_of: Callable[[LoadedModel], Body],
        max_cost: Amount,
        constraints: Constraints,
        explain: bool,
        job_id: bytes | None,
        approve: ordering.Approve | None,
    ) -> JobResult:
        own_id = job_id_of(job_id)
        async with self.desk.job_ids.one_at_a_time(own_id):
            loaded = await self._models_.load(model, task)
            ask = replace(self._ask(loaded, body_of(loaded), max_cost, constraints, explain), job_id=own_id, approve=approve)
            bought = await resuming.ordered_before(self.desk, ask) or await Purchase(self.desk, ask).finish()
        return outcomes.build(self.desk, bought, None)

    def _text(self, model: str, body_of: BodyOf, stream: bool, options: TextOptions) -> ChatStream | Coroutine[Any, Any, ChatResult]:
        default, stops, job_id = Sampling(), stop_strings(options.get("stop")), job_id_of(options.get("job_id"))
        sampling = Sampling(
            options.get("max_tokens", default.max_tokens),
            options.get("temperature", default.temperature),
            options.get("top_p", default.top_p),
            options.get("seed"),
            options.get("logprobs"),
        )

        def ask(loaded: LoadedModel) -> ordering.Ask:
            constraints, explain = options.get("constraints", _NO_CONSTRAINTS), options.get("explain", False)
            made = self._ask(loaded, body_of(loaded, sampling), options.get("max_cost"), constraints, explain)
            kept = {**made.options, "stop": list(stops)} if stops else made.options
            return replace(made, job_id=job_id, approve=options.get("approve"), options=kept)

        load = partial(self._models_.load, model, Task.GENERATE)
        order = TextOrder(self.desk, load, ask, stops, job_id, sampling.logprobs is not None)
        return order.stream() if stream else order.whole()

    async def _preview(self, model: str, inputs: Asked, max_tokens: int, constraints: Constraints) -> ordering.Ask:
        loaded = await self._models_.load(model)
        if isinstance(inputs, Mapping):
            body = tensor_body(loaded, inputs, None)
        elif loaded.entry.task is Task.EMBED:
            body = embed_body(loaded, inputs)
        elif isinstance(inputs, str):
            body = chat_body(loaded, _conversation(inputs, None), Sampling(max_tokens))
        elif is_one(inputs):
            body = completion_body(loaded, [*inputs], Sampling(max_tokens))
        else:
            raise ConfigError(f"model {model} answers one prompt at a time")
        return self._ask(loaded, body, None, constraints, False)

    async def _codec(self, bought: Bought) -> TextCodec | None:
        stored = self.desk.journal.read(lambda c: store.load_job(c, bought.job))
        if stored is None or stored.task is not Task.GENERATE:
            return None
        return (await self._models_.files(stored.spec.model)).codec


def _unlocked(settings: ClientSettings, password: str | None) -> LocalKey:
    from gpumarket.core import keystore

    return keystore.unlock(settings.key_file, settings.password_file, password)


def _conversation(prompt: str | None, messages: Messages | None) -> Messages:
    if (prompt is None) == (messages is None):
        raise ConfigError("give either a prompt or messages")
    return messages if messages is not None else [{"role": "user", "content": str(prompt)}]
