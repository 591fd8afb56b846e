"""Server-sent events from bytes, as WHATWG's HTML standard (9.2.6) defines them, with a bound on what is held.

Lines end in LF, CR or CRLF; a byte order mark at the very start is skipped; lines that begin with a colon are comments;
several `data` lines of one event are joined by newlines; other fields (event, id, retry) carry nothing that an OpenAI
client reads. Knows nothing of JSON. The standard library's `splitlines` of bytes breaks at exactly those three ends,
unlike that of str.
"""

from __future__ import annotations

from collections.abc import Iterator

from replicas.protocol import SignalboxError

_BOM = b"\xef\xbb\xbf"


class EventTooLarge(SignalboxError):
    """An event, or what came of it so far, is over the bound."""


class EventReader:
    """Feed it bytes as they come; it yields the data of every event that is complete."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._at_start = True
        self._after_cr = False

    def feed(self, piece: bytes) -> Iterator[str]:
        """Data of the events that `piece` completes. Raises EventTooLarge; UnicodeDecodeError for data not UTF-8."""
        if not piece:
            return
        if self._at_start:
            piece, self._rest = self._rest + piece, b""
            if len(piece) < len(_BOM) and _BOM.startswith(piece):
                self._rest = piece
                return
            piece, self._at_start = piece.removeprefix(_BOM), False
        for line in self._lines(piece):
            if line:
                self._take(line)
            elif self._data:
                data, self._data, self._size = b"\n".join(self._data), [], 0
                yield data.decode()
        if len(self._rest) + self._size > self._max_bytes:
            raise EventTooLarge(f"the upstream sent an event of more than {self._max_bytes} bytes")

    def end(self) -> Iterator[str]:
        """Data of an event whose closing blank line is missing at the end of the stream.

        The standard drops it; servers that end with a bare "data: [DONE]" exist.
        """
        return self.feed(b"\n\n")

    def _lines(self, piece: bytes) -> list[bytes]:
        """Whole lines; what follows the last is kept. A CR ends its line at once; an LF right after belongs to it."""
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r")
        cut = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
        if not cut:
            self._rest += piece
            return []
        lines = (self._rest + piece[:cut]).splitlines()
        self._rest = piece[cut:]
        return lines

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name != b"data":
            return
        value = value[1:] if value.startswith(b" ") else value
        self._size += len(value)
        if self._size > self._max_bytes:
            raise EventTooLarge(f"the upstream sent an event of more than {self._max_bytes} bytes")
        self._data.append(value)
