"""A client in a process of its own, to be killed: begins a chat, takes as much that it has acknowledged some of it, and rests.

python fault_client.py PROMPT_FILE MODEL MAX_TOKENS         (settings through GPUMARKET_CONFIG)
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from gpumarket.sdk import Client

CHARACTERS = 100
"""Some thirty tokens of the small Llama: more than half a window, so that an ack has gone out, and far from the end."""


async def main(prompt: str, model: str, max_tokens: int) -> None:
    async with Client.from_env() as client:
        stream = client.chat(model, prompt, stream=True, max_tokens=max_tokens, temperature=0.0)
        taken = 0
        async for piece in stream:
            taken += len(piece)
            if taken >= CHARACTERS:
                await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]).read_text(), sys.argv[2], int(sys.argv[3])))
