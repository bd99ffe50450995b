"""A client that dies while a check runs: the next process lets go of the check's money once."""

from __future__ import annotations

from simulation.world import World, simulated_lines, wiped

from gpumarket.core.terms import Task
from gpumarket.sdk import resuming


def test_client_restart_over_an_orphaned_check_lets_go_of_its_maximum_once() -> None:
    """What runs on a channel is read when the channel is first asked for: after the check's end was written it counts the check no more."""
    met = 0
    with simulated_lines():
        for seed in range(1):
            wiped()
            world = World(seed)
            world.run(12)
            for _ in range(3):
                world.client.order(Task.EMBED, [1, 2, 3])
            for _ in range(200):
                world.run(0.05)
                if world.client.medium.read(resuming.orphaned_checks):
                    break
            if orphans := world.client.medium.read(resuming.orphaned_checks):
                world.crash(world.client)
                world.restart(world.client)
                world.run(20)
                assert world.client.desk is not None
                left = [state.open for state in world.client.desk.account._channels.values()]
                assert all(amount >= 0 for amount in left), f"seed {seed}: {left} still run after {len(orphans)} orphaned checks"
                met += len(orphans)
            world.close()
    assert met, "no check was running when its client died"
