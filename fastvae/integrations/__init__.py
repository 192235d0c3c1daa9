"""Other libraries' models on the fused kernels: one module a library, which imports it only when it is called."""


def what_came(given: object) -> str:
    """How an error names what is no model that can be patched, and what to give instead where that is plain."""
    if isinstance(given, type):
        return f"the class {given.__name__}: give an instance of it"
    if hasattr(given, "_orig_mod"):
        return f"what torch.compile makes of {type(given._orig_mod).__name__}: patch the model, then compile it"
    return type(given).__name__
