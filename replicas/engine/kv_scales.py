"""The scales of formats that keep one for the keys, or values, of a layer and KV head: the checkpoint's, else measured.

Measuring runs the model once, over a fixed sample, on an unrounded cache:

    scale = 4 x the largest magnitude of the head's keys (or values) / 448

The 4 leaves room for what the sample did not show; beyond it numbers become the largest code. Room costs a float format
no precision: where the scale doubles, numbers lie one exponent lower, and there the grid is as fine in proportion, down
to the denormals (codes below 2^-6). Those begin 7168 times below the sample's largest number.

The sample is token ids spread evenly over the vocabulary, not text, so that it needs no data and no tokenizer. The same
weights give the same scales on every replica with the same device, type and kernels, whatever the other settings, but
where max_model_len cuts the sample or the step budget its pieces.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import KVFormat
from replicas.engine.model import Decoder
from replicas.protocol import ConfigError

logger = logging.getLogger(__name__)

_SAMPLE, _PIECE = 512, 128  # tokens
_BLOCK = 16
_ROOM = 4.0
_GOLDEN = (5**0.5 - 1) / 2


def choose_kv_scales(decoder: Decoder, kv: KVFormat, stored: Tensor | None, budget: int) -> Tensor | None:
    """Float32 [num_layers, 2, num_kv_heads] for `kv`; None if it takes none.

    stored: the checkpoint's. budget: tokens of a step. ConfigError where there is nothing to measure.
    """
    if not kv.per_head:
        if stored is not None:
            logger.warning(
                "the checkpoint's scales for keys and values are for another kv_cache_dtype than %s", kv.name
            )
        return None
    if stored is not None:
        logger.info("scales of keys and values: the checkpoint's")
        return stored.to(decoder.device)
    largest = largest_magnitudes(decoder, budget)
    if not bool(largest.isfinite().all()):
        raise ConfigError(
            f"kv_cache_dtype {kv.name}: the model's keys and values are not finite in {decoder.dtype}",
            param="kv_cache_dtype",
        )
    logger.info("scales of keys and values: measured on %d tokens", min(_SAMPLE, decoder.max_model_len))
    return kv.scales_for(_ROOM * largest)


def sample(vocab_size: int, tokens: int) -> Tensor:
    """int64 [tokens] by the fractions of multiples of the golden ratio: however many, they leave no wide gap."""
    return torch.tensor([int(i * _GOLDEN % 1 * vocab_size) for i in range(1, tokens + 1)])


@torch.inference_mode()
def largest_magnitudes(decoder: Decoder, budget: int) -> Tensor:
    """Float32 [num_layers, 2, num_kv_heads] on the decoder's device: of keys and values of the sample."""
    tokens = min(_SAMPLE, decoder.max_model_len)
    kv = decoder.plain_cache(-(-tokens // _BLOCK), _BLOCK)
    ids, piece = sample(decoder.config.vocab_size, tokens), min(_PIECE, budget)
    for begin in range(0, tokens, piece):
        decoder.hidden(_step(ids, begin, min(begin + piece, tokens), decoder.device), kv.layers)
    return kv.data.abs().amax(dim=(0, 3, 5)).float()


def _step(ids: Tensor, begin: int, end: int, device: torch.device) -> StepBatch:
    """Tokens begin..end of one sequence in blocks 0, 1, 2 …"""

    def put(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    places = torch.arange(begin, end, device=device)
    return StepBatch(
        token_ids=ids[begin:end].to(device),
        positions=places,
        slot_mapping=places,
        query_start=put(0, end - begin),
        context_lens=put(end),
        block_tables=put(*range(-(-end // _BLOCK))).unsqueeze(0),
        logits_rows=torch.zeros(1, dtype=torch.int64, device=device),
        max_query_len=end - begin,
        max_context_len=end,
    )
