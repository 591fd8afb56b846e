"""Prompt text -> numbers, without a vocabulary: cues (format, length, code, mathematics, language) and hashed n-grams.

Stateless, so a table is hashed once however often it is split. Word hashes are CRC-32, character n-grams are hashed by
a polynomial over the UTF-8 bytes: the same in every process and on every machine.
"""

from __future__ import annotations

import math
import re
import zlib

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Ids = NDArray[np.int32]

HEAD_CHARS = 3072  # a long prompt is read at both ends: the question stands first or last
TAIL_CHARS = 1024
BUCKETS = 8192  # of words, and as many again of character n-grams

_WORD = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
_OPTION = re.compile(r"(?m)^\s*\(?[A-Ea-e1-5][).:]")
_NAME = re.compile(r"\b[A-Z][a-z]+")
_QUESTION = re.compile(r"(?i)\s*(who|what|when|where|which|how|why)\b")
_ORDER = re.compile(r"(?i)\s*(write|create|implement|explain|solve|find|translate|summari[sz]e|list)\b")
_MATH = re.compile(r"\\[a-z]+|\$[^$\n]+\$|\b\d+\s*[-+*/^=]\s*\d+")

# Counted as plain substrings: regular expressions over alternatives took most of a prediction's time.
_CODE = ("```", "def ", "class ", "import ", "#include", "return ", "=>", ");", "SELECT ", "function ")
_STEPS = ("step by step", "boxed", "careful", "show your", "reasoning", "final answer")
_SIGNS = {
    "lines": b"\n",
    "dollars": b"$",
    "backslashes": b"\\",
    "commas": b",",
    "questions": b"?",
    "quotes": b'"',
    "operators": b"=+*/^<>",
    "underscores": b"_",
    "brackets": b"(",
    "full_stops": b".",
}

CUES = (
    *("chars", "words", "word_length", "lines", "digit_share", "numbers", "dollars", "backslashes"),
    *("commas", "comma_share", "ends_with_question", "questions", "options", "upper_share", "starts_lower"),
    *("quotes", "ends_with_stop", "operators", "underscores", "brackets", "foreign_share", "blank", "full_stops"),
    *("names", "question_word", "order_word", "code", "math", "steps"),
)


def clip(text: str) -> str:
    """What the predictor reads of a prompt: all of it, or both ends of a long one."""
    if len(text) <= HEAD_CHARS + TAIL_CHARS:
        return text
    return f"{text[:HEAD_CHARS]}\n{text[-TAIL_CHARS:]}"


def cues(text: str) -> Vector:
    """The values of `CUES` for one prompt, float32 [len(CUES)]; counts are log(1 + n). Any text is fine, "" too."""
    read = clip(text)
    raw = read.encode("utf-8", "replace")
    of_byte = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    digits, capitals = of_byte[48:58].sum(), of_byte[65:91].sum()
    chars, words = len(read) + 1, len(read.split()) + 1
    end = read.rstrip()[-1:]
    counts = {name: int(of_byte[list(signs)].sum()) for name, signs in _SIGNS.items()} | {
        "chars": len(text),
        "words": words * (len(text) + 1) / chars,
        "numbers": len(_NUMBER.findall(read)) if digits else 0,
        "options": len(_OPTION.findall(read)),
        "names": len(_NAME.findall(read)) if capitals else 0,
        "code": sum(map(read.count, _CODE)),
        "math": len(_MATH.findall(read)),
        "steps": sum(map(read.lower().count, _STEPS)),
    }
    plain = {
        "word_length": chars / words,
        "digit_share": digits / chars,
        "comma_share": int(of_byte[44]) / words,
        "ends_with_question": end == "?",
        "upper_share": capitals / chars,
        "starts_lower": read[:1].islower(),
        "ends_with_stop": end in (".", ":"),
        "foreign_share": (len(raw) - len(read)) / chars,
        "blank": "___" in read,
        "question_word": _QUESTION.match(read) is not None,
        "order_word": _ORDER.match(read) is not None,
    }
    values = {name: math.log1p(count) for name, count in counts.items()} | {k: float(v) for k, v in plain.items()}
    return np.array([values[name] for name in CUES], dtype=np.float32)


def hashed_counts(text: str) -> tuple[Ids, Vector]:
    """Hashed word 1-2-grams (buckets 0..BUCKETS) and byte 3-5-grams (the next BUCKETS): sorted ids, 1 + log(count)."""
    read = clip(text)
    hashes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(read.lower())], np.uint32)
    pairs = hashes[:-1] * np.uint32(0x9E3779B1) + hashes[1:]
    words = np.bincount(_bucket(np.concatenate((hashes, pairs))), minlength=BUCKETS)
    stream = np.frombuffer(f" {' '.join(read.split())} ".encode("utf-8", "replace"), np.uint8).astype(np.uint32)
    grams, rolling = [], stream
    for size in range(2, 6):
        rolling = rolling[:-1] * np.uint32(0x01000193) + stream[size - 1 :]
        if size >= 3:
            grams.append(rolling + np.uint32(size))
    characters = np.bincount(_bucket(np.concatenate(grams)), minlength=BUCKETS)
    both = np.concatenate((words, characters))
    ids = np.flatnonzero(both)
    return ids.astype(np.int32), (1 + np.log(both[ids])).astype(np.float32)


def _bucket(hashes: NDArray[np.uint32]) -> NDArray[np.intp]:
    mixed = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return (mixed >> np.uint32(32 - BUCKETS.bit_length() + 1)).astype(np.intp)


def weigh(ids: Ids, counts: Vector, idf: Vector) -> Vector:
    """TF-IDF weights of one prompt's ids; the word part and the character part each have unit length."""
    weights = counts * idf[ids]
    border = int(np.searchsorted(ids, BUCKETS))
    for part in (weights[:border], weights[border:]):
        length = float(np.sqrt(part @ part))
        if length > 0:
            part /= length
    return weights
