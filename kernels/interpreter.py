"""Triton's interpreter, which runs kernels on the CPU where ``TRITON_INTERPRET=1`` was set before triton's import."""

from typing import Any


def mend_interpreter() -> None:
    """Lets loops in interpreted kernels have bounds that are not constants; does nothing where kernels are compiled.

    The interpreter's scalars are arrays of one element, which numpy >= 2.4 does not take for an int
    (github.com/triton-lang/triton/issues/9171).
    """
    import triton

    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
