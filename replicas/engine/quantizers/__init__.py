"""Making quantised checkpoints, in plain torch: methods (rtn, awq, gptq), the run over a model's layers, file layouts.

grid.py         integer grids: where codes come from and what they stand for
rtn.py awq.py gptq.py   one method each: weights and what calibration saw -> codes
block.py        one decoder layer as calibration needs it: in stages, with weights that may be exchanged
job.py          the run: layer after layer, resumable
layouts.py      codes -> tensors and config.json as AutoAWQ, AutoGPTQ and compressed-tensors write them
folder.py       a Hugging Face folder: config, tokenizer, weights
permute.py      a seeded permutation of channels that changes no result

"""

from replicas.engine.quantizers.job import Settings, quantize

__all__ = ["Settings", "quantize"]
