"""Device code. Pointers and scalars have no annotations here: `tl.constexpr` is the only type that Triton reads."""

from __future__ import annotations

from typing import Any

from replicas.engine.triton.device import interpreting


def _let_the_interpreter_count() -> None:
    """Triton 3.6 turns arrays of one element into loop bounds by int(), which numpy 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if interpreting():
    _let_the_interpreter_count()
