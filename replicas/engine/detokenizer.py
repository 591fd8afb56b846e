"""From token ids to text that is safe to show: no torn characters, no part of a stop string. Knows no tensors."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """The text of one choice, byte by byte.

    Bytes of a token may end inside a UTF-8 character: the incremental decoder keeps them until the character is whole
    (or certainly broken: then U+FFFD, as `bytes.decode(errors="replace")` has it). Of the whole characters, the longest
    tail that could still become a stop string is held back, nothing more.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""

    def push(self, data: bytes, *, check_stop: bool = True) -> tuple[str, bool]:
        """Add one token's bytes; returns (text to send now, whether a stop string was met).

        The text ends before the stop string. With check_stop false (fewer than min_tokens so far) everything whole is
        sent, and a stop string may not begin in it.
        """
        return self._take(self._decoder.decode(data), check_stop)

    def flush(self, *, check_stop: bool = True) -> str:
        """The rest, when the choice ends for another reason: what was held back is no stop string after all."""
        text, stopped = self._take(self._decoder.decode(b"", final=True), check_stop)
        if not stopped:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str, check_stop: bool) -> tuple[str, bool]:
        text, self._held = self._held + text, ""
        if not self._stop or not check_stop:
            return text, False
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = self._longest_stop_prefix(text)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text, False

    def _longest_stop_prefix(self, text: str) -> int:
        longest = min(max(map(len, self._stop)) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
