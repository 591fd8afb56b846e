"""Drawing tokens in one pass over float32 logits: see `kernels/sampling.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replicas.engine.draw import draw_limited, is_greedy, is_limited, mixed
from replicas.engine.sequence import Row
from replicas.engine.staging import staged, staged_together
from replicas.engine.triton.device import multiprocessors

_TILE, _REST_TILE = 1024, 2048
_PARTS = 128  # looked at together when a row's parts are compared
_PROGRAMS = 8  # for each multiprocessor, so that few rows fill the device too


def row_key(seed: int, index: int, position: int) -> int:
    """What a row's noise depends on beside token ids: `draw.mixed` as an int64."""
    key = mixed(seed, index, position)
    return key - (key >> 63 << 64)


@dataclass(frozen=True, slots=True)
class Lots:
    """Of N rows of logits: which they are (places), their keys, both int64; 1 / temperature, or 0 for the greatest
    without noise (sharpness), and the least logit that may be drawn (floors), both float32."""

    places: Tensor
    keys: Tensor
    sharpness: Tensor
    floors: Tensor


class GumbelDraw:
    """See `replicas.engine.draw.Draw` for the contract. Noise is in float32, so a token less likely than 2^-32 is not
    drawn as often as it should be."""

    def __init__(self, device: torch.device) -> None:
        self._programs = multiprocessors(device) * _PROGRAMS

    def __call__(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        device, vocab = logits.device, logits.shape[-1]
        chosen = torch.empty(len(rows), dtype=torch.int64, device=device)
        limited = [i for i, row in enumerate(rows) if is_limited(row, vocab)]
        whole = [i for i, row in enumerate(rows) if not is_limited(row, vocab)]
        if whole:
            noisy_argmax(logits, self._lots(logits, rows, whole), chosen, self._parts(vocab, len(whole)))
        if limited:
            places, of_them = staged(limited, device), [rows[i] for i in limited]
            keys = staged([row_key(row.seed, row.index, row.num_output) for row in of_them], device)
            few = logits if len(limited) == len(rows) else logits[places]
            chosen[places] = draw_limited(few, of_them, keys, self._pick, draw_rest)
        return chosen

    def _lots(self, logits: Tensor, rows: Seq[Row], whole: list[int]) -> Lots:
        asked = [rows[i] for i in whole]
        keys = [row_key(row.seed, row.index, row.num_output) for row in asked]
        sharpness = [0.0 if is_greedy(row) else 1 / row.sampling.temperature for row in asked]
        # p < min_p * p_max, in logits: logit < greatest + temperature * log(min_p).
        floors = [
            row.sampling.temperature * math.log(row.sampling.min_p) if row.sampling.min_p > 0 else -math.inf
            for row in asked
        ]
        lots = Lots(
            *staged_together(
                [(whole, torch.int64), (keys, torch.int64), (sharpness, torch.float32), (floors, torch.float32)],
                logits.device,
            )
        )
        if max(floors) > -math.inf:
            return replace(lots, floors=lots.floors + logits.amax(dim=-1)[lots.places])
        return lots

    def _parts(self, width: int, rows: int) -> int:
        return max(min(-(-width // _TILE), self._programs // rows), 1)

    def _pick(self, probs: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
        out = torch.empty(len(keys), dtype=torch.int64, device=keys.device)
        listed_argmax(probs.log().float(), ids, keys, out, self._parts(ids.shape[1], len(keys)))
        return out


def draw_rest(logits: Tensor, limits: Tensor, keys: Tensor, done: Tensor, chosen: Tensor) -> None:
    """chosen [N]: a draw for rows of logits [N, V] that are not `done`. See `draw.Rest`; waits for nothing."""
    from replicas.engine.triton.kernels.sampling import draw_rest as kernel

    assert logits.stride(1) == 1, "the last dimension of logits must be contiguous"
    rows, vocab = logits.shape
    if rows:
        of_rows = limits.reshape(4, rows).float().contiguous()
        kernel[(rows,)](
            *(logits, done.to(torch.int8), keys, of_rows, chosen, vocab, logits.stride(0), rows),
            TILE=_REST_TILE,
            num_warps=8,
        )


def noisy_argmax(logits: Tensor, lots: Lots, out: Tensor, parts: int) -> None:
    """out[places]: the first of the greatest of logits * sharpness + noise(key, column).

    logits: float32 [R, V], rows may lie apart; out: int64 [R]. parts: programs a row, which change no result.
    """
    _launch(logits, logits, lots, out, parts, listed=False)


def listed_argmax(logits: Tensor, ids: Tensor, keys: Tensor, out: Tensor, parts: int) -> None:
    """out [N]: the token of ids [N, W] with the greatest of logits [N, W] + noise(key, id); equals: the first listed.

    keys, ids, out: int64; logits: float32, all contiguous.
    """
    assert ids.is_contiguous(), "ids must be contiguous"
    _launch(logits, ids, Lots(keys, keys, logits, logits), out, parts, listed=True)


def _launch(logits: Tensor, ids: Tensor, lots: Lots, out: Tensor, parts: int, *, listed: bool) -> None:
    from replicas.engine.triton.kernels.sampling import best_of_part, best_of_row

    assert logits.stride(1) == 1, "the last dimension of logits must be contiguous"
    rows, width = len(lots.keys), logits.shape[1]
    if not rows:
        return
    whole = -(-width // _TILE)
    tiles = -(-whole // parts)
    parts = -(-whole // tiles)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    found = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    best_of_part[(rows, parts)](
        *(logits, ids, lots.places, lots.keys, lots.sharpness, lots.floors, best, found),
        *(width, logits.stride(0), tiles),
        LISTED=listed,
        TILE=_TILE,
        num_warps=4,
    )
    best_of_row[(rows,)](*(ids, lots.places, best, found, out, parts, width), LISTED=listed, BLOCK=_PARTS, num_warps=4)
