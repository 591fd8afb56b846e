"""Weights that stay quantised in memory.

    weight.py      QuantizedWeight: the one canonical form, whatever wrote the checkpoint
    packing.py     integers of 2, 4 or 8 bits in bytes and words
    formats.py     what a reader of a checkpoint layout gives, and the table of readers by `quant_method`
    settings.py    what readers share
    awq.py, gptq.py, compressed.py, auto_round.py, gguf_blocks.py   one reader each
    layerwise.py   a layout whose parameters differ by module
    stored.py      the quantised matrices of a folder, checked before they are read
    rounding.py    round-to-nearest at load, from a full-precision checkpoint
    checkpoint.py  a checkpoint seen through the setting `quantization`
    torch_linear.py  the linear layer on torch; the C++ one is in replicas/engine/native

A reader turns a layout into the canonical form and knows no device; a device turns the canonical form into the few
layouts it computes with and knows no checkpoint. A new layout is one new file and one line in `formats.READERS`.
"""
