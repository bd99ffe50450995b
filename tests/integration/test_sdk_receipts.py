"""Receipt files of jobs that a client really bought, over TLS: also after a failover, an early leave, and a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import sdk_models
from sdk_market import CLIENT, FakeProvider, fake_market

from gpumarket.core.errors import ConfigError, JournalError, WalletError
from gpumarket.sdk import Client, ClientSettings, receipt_files
from gpumarket.settlement.receipts import from_json, verify


def client_settings(folder: Path) -> ClientSettings:
    return ClientSettings(state=folder / "client", lock_file=folder / "models.lock", check_probability=0.0, failover_seconds=0.5)


async def test_receipt_file_of_a_job_that_failed_over_holds_offline(tmp_path: Path) -> None:
    dying, good = FakeProvider("dying", dies_after_items=7), FakeProvider("good")
    async with fake_market(tmp_path, dying, good) as market, Client(client_settings(tmp_path), key=CLIENT, chain=market.chain) as client:
        await client.add_model("chat", sdk_models.CHAT.digest)
        result = await client.chat("chat", "hello there", max_tokens=30)
        assert len(result.attempts) == 2
        client.save_receipt(result.job, tmp_path / "r.json", content=True)
        client.save_receipt(result.job, tmp_path / "hashes.json")
        with pytest.raises(WalletError, match="never overwritten"):
            client.save_receipt(result.job, tmp_path / "r.json")
        with pytest.raises(ConfigError, match="not in this journal"):
            client.save_receipt("0x" + "00" * 32, tmp_path / "none.json")
        assert receipt_files.find(client.desk.journal, "0x" + result.job.hex()[:12]) == result.job
        await client.chat("chat", "another", max_tokens=3)
        for prefix in ("0x", "no hex"):
            with pytest.raises(ConfigError, match="begin with"):
                receipt_files.find(client.desk.journal, prefix)
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o600
    proof = verify(from_json((tmp_path / "r.json").read_bytes()))
    assert proof.holds, [f for f in proof.findings if not f.holds]
    assert proof.amount == result.cost
    hashes = from_json((tmp_path / "hashes.json").read_bytes())
    assert hashes.content is None
    assert verify(hashes).holds
    assert result.text not in (tmp_path / "hashes.json").read_text()


async def test_receipt_file_of_embeddings_holds_and_content_is_gone_once_erased(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with Client(client_settings(tmp_path), key=CLIENT, chain=market.chain) as client:
            await client.add_model("mini", sdk_models.EMBED.digest)
            result = await client.embed("mini", ["w1 w2", "w3", "w4 w5 w6"])
        forgetful = client_settings(tmp_path).model_copy(update={"keep_output_days": -1})
        async with Client(forgetful, key=CLIENT, chain=market.chain) as client:
            client.save_receipt(result.job, tmp_path / "r.json")
            with pytest.raises(JournalError, match="erased"):
                client.save_receipt(result.job, tmp_path / "content.json", content=True)
    proof = verify(from_json((tmp_path / "r.json").read_bytes()))
    assert proof.holds, [f for f in proof.findings if not f.holds]
    assert proof.amount == result.cost


async def test_receipt_file_of_a_job_that_was_left_shows_no_completion(tmp_path: Path) -> None:
    async with (
        fake_market(tmp_path, FakeProvider("a")) as market,
        Client(client_settings(tmp_path), key=CLIENT, chain=market.chain) as client,
    ):
        await client.add_model("chat", sdk_models.CHAT.digest)
        stream = client.chat("chat", "hello there", max_tokens=40, stream=True)
        async for _ in stream:
            break
        await stream.aclose()
        (job,) = client.jobs()
        assert job.state == "cancelled"
        client.save_receipt(job.job, tmp_path / "r.json")
    proof = verify(from_json((tmp_path / "r.json").read_bytes()))
    assert proof.holds, [f for f in proof.findings if not f.holds]
    assert proof.amount == job.cost
    assert any("completed" in line for line in proof.not_proven)
