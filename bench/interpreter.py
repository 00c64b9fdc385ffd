"""What an old Triton's interpreter needs beside a new NumPy: for tests, and for rehearsals of the GPU report."""

import triton


def count_loops_with_new_numpy() -> None:
    """Let Triton's interpreter count a loop to a bound that a kernel has as a tensor.

    Its scalars are arrays of shape [1]. In Triton 3.6 it calls ``int`` on one, which NumPy refuses from 2.4 on; in 3.8
    it takes the element. The fault is the interpreter's alone: compiled loops are right.
    """
    if not triton.knobs.runtime.interpret or tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
