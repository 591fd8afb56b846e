"""Our Triton kernels for GPUs. Nothing outside knows more than the engine's `Attention`, `Ops`, `Linear` and `Stack`.

    device.py      whether they can run here, and what they must know of the device
    kernels/       the device code, in Triton's own subset of Python
    attention.py   paged attention: a prefill kernel for any batch, a split kernel for steps of few tokens a sequence
    cache.py       keys and values into the cache, rounded to 8 bits on the way where the format says so
    ops.py         norms, rotary embeddings, SiLU · up
    sampling.py    tokens drawn from logits with noise; noise.py is the same noise in numpy, to compare with
    stack.py       the decoder's layers with rotary embeddings and the cache's write in one kernel

They also run without a GPU, slowly, in Triton's interpreter (TRITON_INTERPRET=1): that is how they are tested. Import
`triton` inside functions everywhere but in `kernels/`: a machine without it must be able to import the rest.
"""
