"""Triton's interpreter patches triton.language again for each call of a device function, which is a third
of its time. Once a launch is enough: a second time it finds nothing left to patch."""


def patch_once() -> None:
    """Let the interpreter patch each module once a launch."""
    from triton import language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton
        return
    patch, done = interpreter._patch_lang, set()

    def patched(function):
        modules = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if modules and modules <= done:
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore = scope.restore
        done.update(modules)
        scope.restore = lambda: (restore(), done.clear())
        return scope

    interpreter._patch_lang = patched
