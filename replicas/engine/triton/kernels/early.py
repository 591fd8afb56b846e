"""What kernels do that may be launched before the one in front of them is done. See `triton.overlap`."""

import triton
import triton.language as tl


@triton.jit
def wait_for_others(EARLY: tl.constexpr):
    """Wait for everything launched before. Nothing that any kernel writes may be touched earlier."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers, EARLY: tl.constexpr):
    """Have the 128 bytes around each of `pointers` brought to the L2 cache: of weights only, for this may be early."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
