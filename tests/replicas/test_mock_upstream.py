from __future__ import annotations

import asyncio
import json
import sys
import urllib.request


def fetch(url: str, body: dict[str, object] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=5) as response:
        return bytes(response.read())


async def test_the_command_serves_and_tells_what_it_has_seen() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "replicas.mock_upstream", "--behaviour", "normal:tokens=2", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        url = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()[-1]
        chat = {"model": "any", "messages": [], "stream": True}
        first = await asyncio.to_thread(fetch, f"{url}/chat/completions", chat)
        assert first == await asyncio.to_thread(fetch, f"{url}/chat/completions", chat)
        assert first.endswith(b"data: [DONE]\n\n")
        books = json.loads(await asyncio.to_thread(fetch, url.removesuffix("/v1") + "/mock"))
        assert books["requests"] == {"normal:tokens=2": 2}
        assert (books["connections"], books["abandoned"]) == (3, 0)
    finally:
        process.terminate()
        await process.wait()
