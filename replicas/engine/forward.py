"""From a step to logits: the decoder on the KV cache, recorded where steps are, kernels overlapping where that pays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.config import EngineConfig
from replicas.engine.graphs import Graph, GraphRunner, choose_padding
from replicas.engine.kv_format import KVTensors
from replicas.engine.loading import Loaded
from replicas.engine.triton.overlap import choose_overlap, overlap


class Forward:
    """graphs: None where steps are launched as they are. overlaps: whether kernels begin before others are done.

    make_graph: what steps are recorded with, if they are. scratch: a block of `kv` that no sequence ever gets.
    max_model_len: of the engine.
    """

    def __init__(
        self,
        loaded: Loaded,
        config: EngineConfig,
        kv: KVTensors,
        max_model_len: int,
        scratch: int,
        make_graph: Callable[[], Graph] | None,
    ) -> None:
        self._decoder, self._kv = loaded.decoder, kv
        self.graphs: GraphRunner | None = None
        self.overlaps = False
        if make_graph is None:
            return
        self.graphs = GraphRunner(
            self._as_chosen,
            make_graph,
            max_seqs=config.max_num_seqs,
            max_query_len=config.tokens_per_step,
            max_blocks=-(-max_model_len // config.block_size),
            block_size=config.block_size,
            scratch=scratch,
            device=loaded.device,
            pad=choose_padding(loaded.device),
        )
        self.overlaps = self._try_overlap(self.graphs, make_graph, loaded.device)

    @torch.inference_mode()
    def _try_overlap(self, graphs: GraphRunner, make_graph: Callable[[], Graph], device: torch.device) -> bool:
        """On steps of one sequence, a place further on in the scratch block and with another token each time."""
        idle = graphs.idle()
        places = self._kv.data.shape[3]  # of a block
        first = idle.slot_mapping.clone()

        def turn(i: int) -> None:
            idle.token_ids.fill_(1 + i)
            idle.positions.fill_(i % places)
            idle.slot_mapping.copy_(first + i % places)
            idle.context_lens.fill_(i % places + 1)

        return choose_overlap(lambda: self._compute(idle)[0], turn, make_graph, device)

    @torch.inference_mode()
    def __call__(self, batch: StepBatch) -> tuple[Tensor, ...]:
        """Logits float32 [R, V] and last hidden states [R, H] of the rows that are wanted; the next call may write to
        their memory."""
        return self._compute(batch) if self.graphs is None else self.graphs(batch)

    def _as_chosen(self, batch: StepBatch) -> tuple[Tensor, ...]:
        with overlap(self.overlaps):
            return self._compute(batch)

    @torch.inference_mode()
    def _compute(self, batch: StepBatch) -> tuple[Tensor, ...]:
        hidden = self._decoder.hidden(batch, self._kv.layers)
        return self._decoder.logits(hidden), hidden
