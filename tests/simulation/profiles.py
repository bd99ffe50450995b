"""How the machines of this folder are run, and run again. Nothing here depends on how fast the computer is."""

from __future__ import annotations

import os
import re
import secrets

from hypothesis import HealthCheck, Phase, reproduce_failure, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, get_state_machine_test

EXAMPLES, EXAMPLES_ALL, STEPS = 200, 20_000, 12
REPLAY = "GPUMARKET_REPLAY"
"""Names one history to run again: version:blob, as a failure says."""
SEED = "GPUMARKET_SEED"
"""Names the seed of a whole run to run again, as its line in the summary says."""
RUNS: list[str] = []
"""What was run with which seed: `tests/conftest.py` prints it at the end, also of what passed."""


def profile(examples: int, *, shrink: bool = True, steps: int = STEPS) -> settings:
    """Settings of a run; a failure prints the seed, the rules, and the line that runs them again."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        phases=phases if shrink else [Phase.generate],
        database=settings.default.database if shrink and settings.default is not None else None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def run(machine: type[RuleBasedStateMachine], examples: int, *, shrink: bool = True, steps: int = STEPS) -> None:
    """Run histories of a machine, or the one that the environment names. Raises what the first that fails raises."""
    test = get_state_machine_test(machine, settings=profile(examples, shrink=shrink, steps=steps))
    where = os.environ.get("PYTEST_CURRENT_TEST", "tests/simulation").rpartition(" (")[0] or "tests/simulation"
    named, number = os.environ.get(REPLAY), int(os.environ.get(SEED) or secrets.randbits(32))
    if named:
        version, _, blob = named.partition(":")
        test = reproduce_failure(version, blob.encode())(test)
    else:
        test = seed(number)(test)
        RUNS.append(f"{machine.__name__}, {examples} histories: {SEED}={number} .venv/bin/pytest '{where}'")
    try:
        test()
    except BaseException as error:
        found = re.search(r"reproduce_failure\('([^']+)', b'([^']+)'\)", "\n".join(getattr(error, "__notes__", [])))
        if found:
            error.add_note(f"run this history again: {REPLAY}='{found[1]}:{found[2]}' .venv/bin/pytest '{where}'")
        raise
