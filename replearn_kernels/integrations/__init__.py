"""Other libraries with their own code and our losses, one file per library, imported only when asked for.

    from replearn_kernels.integrations import open_clip
    open_clip.apply()                        # open_clip, its training script too, makes our losses

    from replearn_kernels.integrations.transformers import apply_to_clip
    apply_to_clip(model)                     # the model's loss never forms its logits

Each file needs its library, in a version that it was tested with, and raises ImportError elsewhere. What is
compared with what, values and gradients are the library's own. See docs/integrations.md.
"""
