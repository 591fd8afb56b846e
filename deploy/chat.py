"""`signalbox chat`: a conversation with the endpoint in the terminal. Speaks HTTP only, like any client."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from deploy import instance
from replicas.protocol import ConfigError, SignalboxError

_TIMEOUT = httpx.Timeout(10.0, read=300.0)


class ChatFailed(SignalboxError):
    pass


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask once and leave; without it, a conversation.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name; the endpoint's first one by default.")] = None,
    base_url: Annotated[
        str | None, typer.Option(envvar="SIGNALBOX_BASE_URL", help="The endpoint; this home's instance by default.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SIGNALBOX_API_KEY", help="An API key; the instance's own by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of each answer.")] = None,
) -> None:
    """Talk to the endpoint from the terminal. /exit or Ctrl-D ends it, /reset forgets, Ctrl-C stops an answer."""
    console = Console()
    url, key = _endpoint(base_url, api_key)
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=_TIMEOUT) as client:
        options = {"temperature": temperature, "max_tokens": max_tokens}
        talk = Conversation(client, model or _first_model(client), system, options)
        if prompt is not None:
            _answer(console, talk, prompt)
            return
        console.print(f"[dim]{talk.model} at {url}; /exit ends, /reset forgets[/dim]")
        for line in _lines(console):
            if line == "/reset":
                talk.reset()
            else:
                _answer(console, talk, line)


class Conversation:
    """What was said so far, and how to go on. A turn that fails leaves it as it was."""

    def __init__(self, client: httpx.Client, model: str, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self._client = client
        self._opening = [{"role": "system", "content": system}] if system else []
        self._options = {name: value for name, value in options.items() if value is not None}
        self._messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        self._messages = list(self._opening)

    def say(self, text: str) -> Iterator[str]:
        """The answer in pieces as they come. What has come counts as said, also when the reader stops early."""
        messages = [*self._messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        pieces: list[str] = []
        try:
            for piece in self._stream(body):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatFailed(_reason(response))
                yield from _deltas(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatFailed(f"the endpoint does not answer: {error or type(error).__name__}") from error


def _deltas(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ChatFailed(event["error"]["message"])
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text
    raise ChatFailed("the answer was cut off")


def _endpoint(base_url: str | None, api_key: str | None) -> tuple[str, str]:
    record = None if base_url and api_key else instance.running()
    if not base_url and record is None:
        raise ConfigError("no instance is running in this home; start one with `signalbox up` or give --base-url")
    key = api_key or os.environ.get("OPENAI_API_KEY") or (record.api_key if record else None)
    if not key:
        raise ConfigError("no API key; create one with `signalbox keys create NAME` and give it as --api-key")
    url = base_url or (record.base_url if record else "")
    return url.rstrip("/").removesuffix("/v1"), key


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ChatFailed(f"the endpoint does not answer: {error or type(error).__name__}") from error
    if response.status_code != 200:
        raise ChatFailed(_reason(response))
    return str(response.json()["data"][0]["id"])


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the endpoint answered {response.status_code}"


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


def _answer(console: Console, talk: Conversation, text: str) -> None:
    """Show the answer as it grows; as Markdown on a terminal, as plain text in a pipe."""
    pieces = talk.say(text)
    try:
        if not console.is_terminal:
            for piece in pieces:
                console.out(piece, end="")
            console.out()
            return
        shown = ""
        with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
            for piece in pieces:
                shown += piece
                live.update(Markdown(shown))
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # closes the connection, which aborts the request
        console.print("[dim](stopped)[/dim]")
    except ChatFailed as error:
        if not console.is_terminal:
            raise
        console.print(f"[red]{error.message}[/red]")
