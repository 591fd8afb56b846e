"""Text -> predicted quality of every model. Numpy only; about half a millisecond a prompt.

    text ─► cues (standardised) ─────────────────────────────┐
         └► hashed n-grams ─► TF-IDF ─► projection (LSA) ────┴─┬► extra trees ──────────┐
                                                               └► nearest neighbours ───┴─► mean: quality per model

The trees are sharper on prompts like those of the table; neighbours in the same space (cosine, so format and cues count
as much as words) hold up better on kinds of prompt that the table does not have.

The artefact is a folder of two files: `predictor.json` (format, models, settings, checksum) and `predictor.npz` (arrays
only, read with pickles forbidden). The JSON is written last and names the sha256 of the npz: a half-written or altered
artefact is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.rightsize.features import BUCKETS, CUES, Ids, Vector, cues, hashed_counts, weigh
from policies.rightsize.table import prompt_hash
from policies.rightsize.trees import Forest
from replicas.protocol import ConfigError

FORMAT = "signalbox-rightsize"
VERSION = 1
CHUNK = 256  # prompts predicted at once: bounds the memory of similarities
_FOREST = ("feature", "threshold", "left", "right", "value", "roots")


class ArtefactError(ConfigError):
    """A predictor's folder that is missing, damaged or of another version."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What validation chooses. dimensions: of the projection; leaf: fewest training prompts under a leaf."""

    dimensions: int = 32
    leaf: int = 25
    trees: int = 100
    neighbours: int = 100


@dataclass(frozen=True)
class Predictor:
    """A trained table. `seen` holds hashes of the training prompts: an evaluation must not meet them again.

    idf: float32 [2 * BUCKETS]; projection: float32 [2 * BUCKETS, dimensions]; centre, spread: float32
    [dimensions + cues]; known: float32 [prompts, dimensions + cues], unit rows; known_scores: float32 [prompts,
    models].
    `name` (the start of the arrays' sha256) is what explanations quote.
    """

    models: tuple[str, ...]
    settings: Settings
    idf: Vector
    projection: NDArray[np.float32]
    centre: Vector
    spread: Vector
    forest: Forest
    known: NDArray[np.float32]
    known_scores: NDArray[np.float32]
    seen: frozenset[str]
    name: str = ""

    def predict(self, text: str) -> Vector:
        """Predicted quality of each of `models` for one prompt, float32 [models], each in 0..1."""
        quality: Vector = self.predict_features(self.embed(*hashed_counts(text), cues(text))[None])[0]
        return quality

    def predict_all(self, texts: Iterable[str]) -> NDArray[np.float32]:
        rows = [self.embed(*hashed_counts(text), cues(text)) for text in texts]
        return self.predict_features(np.array(rows, np.float32).reshape(-1, len(self.centre)))

    def embed(self, ids: Ids, counts: Vector, values: Vector) -> Vector:
        """The trees' input for one prompt: projection and cues, standardised, outliers held within 6 deviations."""
        text = weigh(ids, counts, self.idf) @ self.projection[ids]
        row = (np.concatenate((text, values)) - self.centre) / self.spread
        held: Vector = np.clip(row, -6, 6).astype(np.float32)
        return held

    def predict_features(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        result = np.empty((len(rows), len(self.models)), np.float32)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            result[start : start + CHUNK] = (self.forest.predict(part) + self._nearest(part)) / 2
        return result

    def _nearest(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean score of the `neighbours` training prompts with the largest cosine (scaling a row changes no order)."""
        kept = min(self.settings.neighbours, len(self.known))
        nearest = np.argpartition(-(rows @ self.known.T), kept - 1, axis=1)[:, :kept]
        mean: NDArray[np.float32] = self.known_scores[nearest].mean(axis=1, dtype=np.float32)
        return mean

    def overlap(self, prompts: Iterable[str]) -> int:
        """How many of these prompts it was trained on."""
        return sum(prompt_hash(prompt) in self.seen for prompt in prompts)

    def save(self, folder: Path, report: Mapping[str, Any] | None = None) -> None:
        """Write the artefact, each file atomically and the one that vouches for the other last."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"idf": self.idf, "projection": self.projection, "centre": self.centre, "spread": self.spread}
        arrays |= {"known": self.known, "known_scores": self.known_scores}
        arrays |= {f"forest_{name}": getattr(self.forest, name) for name in _FOREST}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        content = buffer.getvalue()
        document = {
            "format": FORMAT,
            "version": VERSION,
            "name": hashlib.sha256(content).hexdigest()[:12],
            "sha256": hashlib.sha256(content).hexdigest(),
            "models": list(self.models),
            "settings": asdict(self.settings),
            "buckets": BUCKETS,
            "cues": list(CUES),
            "depth": self.forest.depth,
            "seen": sorted(self.seen),
            "report": dict(report or {}),
        }
        write_atomically(folder / "predictor.npz", content)
        write_atomically(folder / "predictor.json", json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Read an artefact. Raises ArtefactError that names the file and what is wrong with it."""
        document = _document(folder / "predictor.json")
        arrays = _arrays(folder / "predictor.npz", str(document.get("sha256")))
        try:
            predictor = cls(
                tuple(str(model) for model in document["models"]),
                Settings(**document["settings"]),
                arrays["idf"],
                arrays["projection"],
                arrays["centre"],
                arrays["spread"],
                Forest(**{name: arrays[f"forest_{name}"] for name in _FOREST}, depth=int(document["depth"])),
                arrays["known"],
                arrays["known_scores"],
                frozenset(document["seen"]),
                str(document["name"]),
            )
            _check_shapes(predictor, folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{folder / 'predictor.json'} is incomplete: {error}") from None
        return predictor


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the path, then rename: a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ArtefactError(f"{path} is damaged: not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtefactError(f"{path} is no right-size predictor")
    if document.get("version") != VERSION:
        raise ArtefactError(f"{path} has version {document.get('version')!r}; this build reads {VERSION}: train again")
    if document.get("buckets") != BUCKETS or document.get("cues") != list(CUES):
        raise ArtefactError(f"{path} was made with other features than this build has: train again")
    return document


def _arrays(path: Path, sha256: str) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ArtefactError(f"{path} is damaged: its sha256 is not the one that predictor.json names")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, zipfile.BadZipFile):
        raise ArtefactError(f"{path} is damaged: not an archive of plain arrays") from None


def _check_shapes(predictor: Predictor, folder: Path) -> None:
    width = predictor.settings.dimensions + len(CUES)
    nodes = len(predictor.forest.feature)
    links = (predictor.forest.left, predictor.forest.right, predictor.forest.roots)
    sound = (
        predictor.idf.shape == (2 * BUCKETS,)
        and predictor.projection.shape == (2 * BUCKETS, predictor.settings.dimensions)
        and predictor.centre.shape == predictor.spread.shape == (width,)
        and predictor.known.shape == (len(predictor.known_scores), width)
        and predictor.known_scores.shape[1:] == (len(predictor.models),)
        and len(predictor.known) > 0
        and predictor.settings.neighbours > 0
        and predictor.forest.value.shape == (nodes, len(predictor.models))
        and len(predictor.forest.threshold) == nodes
        and all(len(link) > 0 and 0 <= link.min() and link.max() < nodes for link in links)
        and 0 <= predictor.forest.feature.min() <= predictor.forest.feature.max() < width
    )
    if not sound:
        raise ArtefactError(f"{folder / 'predictor.npz'} does not fit predictor.json: shapes differ")
