"""Settings of a scheduler: defaults that hold together, and refusals that name the setting."""

from __future__ import annotations

import pytest

from gpumarket.core.errors import ConfigError
from gpumarket.core.settings import load
from gpumarket.scheduler.settings import SchedulerSettings


def test_settings_defaults_are_consistent() -> None:
    settings = load(SchedulerSettings, env={})
    assert settings.spoke_seconds > 4 * (settings.max_job_seconds + settings.channel_margin_seconds)
    assert settings.channel_margin_seconds >= settings.check_seconds + settings.claim_grace_seconds + 3_600
    assert settings.spoke_refill_amount < settings.spoke_deposit_amount
    assert settings.database_url.startswith("sqlite:////")


def test_settings_read_from_variables() -> None:
    assert load(SchedulerSettings, env={"GPUMARKET_SCHEDULER_FEE_PPM": "500"}).fee_ppm == 500


@pytest.mark.parametrize("env", [{"GPUMARKET_SCHEDULER_STAKE": "a lot"}, {"GPUMARKET_SCHEDULER_SPOKE_DEPOSIT": "-1"}])
def test_settings_amount_that_is_none_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"setting scheduler\."):
        load(SchedulerSettings, env=env)


def test_settings_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        load(SchedulerSettings, env={"GPUMARKET_SCHEDULER_FEE_PMM": "1"})
    assert "fee_ppm" in caught.value.hint
