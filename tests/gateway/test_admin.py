"""/admin/v1/policies over real HTTP semantics: who may, what is answered, and that nothing waits that must not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway import openapi
from gateway.admin import MAX_BODY_BYTES, Admin, create_router
from gateway.admin_tokens import AdminTokenRegister
from gateway.db.database import Database
from gateway.edge import Edge
from gateway.keys import KeyRegister, KeyRing
from gateway.metrics import Metrics
from gateway.policy_follower import PolicyFollower
from policies.document import FleetNames, PolicyDocument
from policies.document_schema import schema
from replicas.protocol import AuthenticationFailed, InvalidRequest

SECRET = b"a secret for tests only"
PREFIX = "/admin/v1/policies"
NAMES = FleetNames(("small", "big"))


@dataclass
class Running:
    """A gateway's admin side and one follower, whose building of generations a test may slow down or refuse."""

    client: httpx.AsyncClient
    url: str
    database: Database
    follower: PolicyFollower[Any]
    app: FastAPI
    build: dict[str, Callable[[PolicyDocument], Any]] = field(default_factory=dict)

    async def get(self, path: str, **options: Any) -> Any:
        response = await self.client.get(PREFIX + path, **options)
        assert response.status_code == 200, response.text
        return response.json()

    async def post(self, path: str, body: Any, status: int = 200) -> Any:
        response = await self.client.post(PREFIX + path, json=body)
        assert response.status_code == status, response.text
        return response.json() if status == 200 else response.json()["error"]


@pytest.fixture
async def running(tmp_path) -> AsyncIterator[Running]:
    async with start(f"sqlite:///{tmp_path}/admin.db") as gateway:
        yield gateway


@asynccontextmanager
async def start(url: str) -> AsyncIterator[Running]:
    build: dict[str, Callable[[PolicyDocument], Any]] = {}

    def compile(_: int, document: PolicyDocument) -> Any:
        return build["now"](document) if "now" in build else None

    async with AsyncExitStack() as stack:
        database = Database(url)
        stack.callback(database.close)
        follower: PolicyFollower[Any] = PolicyFollower(database, "gw", NAMES, compile, poll_s=0.02)
        await follower.start()
        stack.push_async_callback(follower.aclose)
        admin = Admin(database, url, SECRET, names=NAMES)
        stack.push_async_callback(admin.aclose)
        app = FastAPI()
        app.add_middleware(Edge, metrics=Metrics([]), server_sends_request_id=False)
        app.include_router(create_router(lambda: admin))
        openapi.install(app)
        with AdminTokenRegister(url, SECRET) as tokens:
            token = tokens.create("ops")
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://gateway",
            headers={"authorization": f"Bearer {token}"},
            timeout=20,
        )
        yield Running(await stack.enter_async_context(client), url, database, follower, app, build)


async def test_a_document_goes_through_its_whole_life(running: Running) -> None:
    text = "aliases:\n  fast: small\n"
    valid = await running.post("/validate", {"document": text})
    assert valid == {
        "valid": True,
        "normalised": '{"aliases": {"fast": "small"}}',
        "changes": ['+ aliases.fast: "small"'],
    }
    assert await running.post("/diff", {"document": text}) == {"changes": ['+ aliases.fast: "small"']}

    published = await running.post("", {"document": text, "why": "a faster one"})
    assert (published["active"], published["gateways"], published["unanswered"]) == (1, ["gw"], [])
    assert running.follower.generation_for("k").document.aliases == {"fast": "small"}

    canary = await running.post("", {"document": "{}", "canary": 0.2, "parent": 1})
    assert (canary["active"], canary["canary"], canary["share"]) == (1, 2, 0.2)
    assert (await running.post("/canary/promote", {"share": 0.5}))["share"] == 0.5
    assert (await running.post("/canary/cancel", {}))["canary"] is None
    assert (await running.post("", {"document": "{}", "canary": 0.2}))["canary"] == 3
    assert (await running.post("/canary/promote", {}))["active"] == 3
    assert (await running.post("/rollback", {"why": "oops"}))["active"] == 1
    assert (await running.post("/rollback", {"to": 3}))["active"] == 3

    history = await running.get("", params={"limit": 2})
    assert history["active"] == 3
    assert [(one["number"], one["state"], one["author"]) for one in history["data"]] == [
        (3, "active", "ops"), (2, "past", "ops"),
    ]  # fmt: skip
    assert (await running.get("/active"))["number"] == 3
    assert (await running.get("/1"))["document"] == text
    assert await running.get("/diff", params={"from": 0, "to": 1}) == {"changes": ['+ aliases.fast: "small"']}
    audit = (await running.get("/audit"))["data"]
    assert [one["action"] for one in audit] == [
        "rollback", "rollback", "promote", "publish", "cancel", "promote", "publish", "publish",
    ]  # fmt: skip
    assert (audit[-1]["actor"], audit[-1]["why"], audit[-1]["diff"]) == (
        "ops",
        "a faster one",
        '+ aliases.fast: "small"',
    )
    older = (await running.get("/audit", params={"limit": 2, "before": audit[1]["id"]}))["data"]
    assert older == audit[2:4]
    assert (await running.get("/gateways"))["data"][0]["id"] == "gw"
    assert await running.get("/schema") == schema()


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        ("", {"document": "a:\n  b: [\n"}, 400, "invalid_policy", "policy:3: not valid YAML"),
        ("", {"document": "alises: {}\n"}, 400, "invalid_policy", "policy:1: alises: unknown key; did you mean"),
        ("/validate", {"document": "{}\naliases: {a: smal}\n"}, 400, "invalid_policy", "policy:2: not valid YAML"),
        ("/diff", {"document": "aliases: {a: smal}\n"}, 400, "invalid_policy", "did you mean 'small'?"),
        ("", {"document": "x" * 1_000_001}, 400, "invalid_policy", "the limit is 1000000"),
        ("/validate", {"document": "canary: {share: 2}"}, 400, "invalid_policy", "policy:1: canary.share: "),
        ("", {"document": "{}", "parent": 9}, 409, "policy_conflict", "generation 0 is active, not 9"),
        ("", {"document": "{}", "wy": ""}, 400, None, "wy: "),
        ("", {"document": 7}, 400, None, "document: "),
        ("", {"document": "{}", "canary": 1.5}, 400, None, "canary: "),
        ("", {}, 400, None, "document: "),
        ("", [], 400, None, "body: "),
        ("/rollback", {}, 400, None, "nothing to roll back to"),
        ("/rollback", {"to": 9}, 404, "generation_not_found", "no policy generation 9"),
        ("/rollback", {"to": 10**20}, 404, "generation_not_found", f"no policy generation {10**20}"),
        ("/canary/promote", {}, 400, None, "no canary"),
        ("/canary/cancel", {}, 400, None, "no canary"),
    ],
)  # fmt: skip
async def test_a_refusal_has_openai_s_shape_and_changes_nothing(
    running: Running, path: str, body: Any, status: int, code: str | None, message: str
) -> None:
    error = await running.post(path, body, status)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert message in error["message"]
    assert (await running.get(""))["active"] == 0


async def test_what_is_not_json_or_not_there_or_too_large_is_refused(running: Running) -> None:
    client = running.client
    for path, status in (("/9", 404), ("/nine", 400), ("/diff?from=0", 400), ("?limit=0", 400), ("?limit=1001", 400)):
        response = await client.get(PREFIX + path)
        assert (response.status_code, set(response.json())) == (status, {"error"})
    assert (await client.post(PREFIX, content=b"{")).json()["error"]["message"] == "the request body is not valid JSON"
    response = await client.post(PREFIX, content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("path", "status"), [(f"/{10**20}", 404), (f"/diff?from=0&to={10**20}", 404), (f"/audit?before={10**20}", 400)]
)
async def test_a_number_that_no_database_holds_is_refused(running: Running, path: str, status: int) -> None:
    assert (await running.client.get(PREFIX + path)).status_code == status


async def test_a_generation_that_a_gateway_refuses_is_422_and_names_gateway_and_reason(running: Running) -> None:
    def refuse(_: PolicyDocument) -> None:
        raise InvalidRequest("no predictor here")

    running.build["now"] = refuse
    error = await running.post("", {"document": "{}"}, 422)
    assert error["code"] == "publish_refused"
    assert "gateway gw cannot serve it: no predictor here" in error["message"]


async def test_publishing_blocks_neither_the_event_loop_nor_the_database_thread(running: Running) -> None:
    running.build["now"] = lambda _: time.sleep(0.6)
    publishing = asyncio.create_task(running.post("", {"document": "{}"}))
    longest = 0.0
    while not publishing.done():
        began = time.monotonic()
        await running.database.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
        await asyncio.sleep(0)
        longest = max(longest, time.monotonic() - began)
    assert (await publishing)["active"] == 1
    assert longest < 0.3


def admin_operations(running: Running) -> list[tuple[str, str, Any]]:
    paths = running.app.openapi()["paths"]
    operations = [(path, method, one) for path, methods in paths.items() for method, one in methods.items()]
    return [one for one in operations if one[0].startswith("/admin/")]


async def test_an_api_key_opens_no_admin_route_and_an_admin_token_no_other(running: Running) -> None:
    with KeyRegister(running.url, SECRET) as keys:
        key = keys.create("alice")
    routes = admin_operations(running)
    assert len(routes) == 13
    for path, method, _ in routes:
        for credential in (f"Bearer {key}", "Bearer adm-" + "0" * 48, ""):
            headers = {"authorization": credential}
            response = await running.client.request(method, path.replace("{number}", "0"), headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    ring = KeyRing(running.database, SECRET, poll_s=0.4, stale_s=0.9)
    await ring.start()
    token = running.client.headers["authorization"]
    with pytest.raises(AuthenticationFailed):
        await ring.authenticate(token.encode())
    await ring.aclose()


async def test_nothing_of_the_body_is_read_before_the_token_is_known(running: Running) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    response = await running.client.post(PREFIX, content=body(), headers={"authorization": "Bearer sk-x"})
    assert response.status_code == 401


async def test_a_revoked_token_is_refused_at_once(running: Running) -> None:
    await running.get("")
    with AdminTokenRegister(running.url, SECRET) as tokens:
        with pytest.raises(InvalidRequest, match="exists"):
            tokens.create("ops")
        tokens.revoke("ops")
        await asyncio.sleep(0.06)
        assert (await running.client.get(PREFIX)).status_code == 401
        assert [token.revoked_at is None for token in tokens.list()] == [False]
        with pytest.raises(InvalidRequest, match="no live admin token"):
            tokens.revoke("ops")


def test_the_token_itself_is_stored_nowhere(tmp_path) -> None:
    with AdminTokenRegister(f"sqlite:///{tmp_path}/t.db", SECRET) as tokens:
        token = tokens.create("ops")
        for name in ("", "a\nb", "x" * 129):
            with pytest.raises(InvalidRequest):
                tokens.create(name)
    assert token[4:].encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


async def test_every_route_is_documented_with_its_credential_and_its_errors(running: Running) -> None:
    document = running.app.openapi()
    assert document["components"]["securitySchemes"]["admin"]["scheme"] == "bearer"
    for _, _, operation in admin_operations(running):
        assert operation["security"] == [{"admin": []}]
        assert operation["description"]
        for status in ("400", "401", "409"):
            answer = operation["responses"][status]["content"]["application/json"]["schema"]
            assert answer["$ref"].endswith("/ErrorResponse")


async def test_a_gateway_that_stops_ends_a_publication_that_waits(tmp_path) -> None:
    async with start(f"sqlite:///{tmp_path}/admin.db") as gateway:
        gateway.build["now"] = lambda _: time.sleep(0.5)
        publishing = asyncio.create_task(gateway.client.post(PREFIX, json={"document": "{}"}))
        await asyncio.sleep(0.2)
    response = await publishing
    assert response.status_code == 422
    assert "stopping" in response.json()["error"]["message"]
