"""Other libraries with their own code and our losses, one file per library, imported only when asked for.

    from replearn_kernels.integrations import open_clip as fused
    fused.apply()                            # open_clip makes our losses

    from replearn_kernels.integrations.transformers import apply_to_clip
    apply_to_clip(model)                     # the model's loss never forms its logits

Each file needs its library, in a range of versions, and raises ImportError elsewhere. Values and gradients are those
of the library's own classes. See docs/integrations.md.
"""
