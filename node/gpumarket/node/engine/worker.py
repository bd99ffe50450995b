"""The engine process: `python -m gpumarket.node.engine.worker --fd N --parent PID`.

Invariant: rights and network are given up before anything heavy is imported; arguments and environment hold nothing secret; when the
parent goes, this process goes.
"""

from __future__ import annotations

import argparse

from gpumarket.node.engine import sandbox


def main() -> None:
    """Enter the sandbox, then serve until the parent hangs up."""
    parser = argparse.ArgumentParser(description="engine process of a gpumarket provider; started by it, not by hand")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    parser.add_argument("--parent", type=int, required=True, help="process to die with")
    arguments = parser.parse_args()
    in_force = sandbox.enter(arguments.parent)

    # Only now: importing torch starts threads, and a process with threads cannot enter a user namespace.
    from gpumarket.node.engine.serve import run

    run(arguments.fd, in_force)


if __name__ == "__main__":
    main()
