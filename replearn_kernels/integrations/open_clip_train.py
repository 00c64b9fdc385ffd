"""open_clip's training script with our losses, and its own arguments (it needs ``open_clip_torch[training]``)::

    torchrun --nproc_per_node 8 -m replearn_kernels.integrations.open_clip_train --model ViT-B-32 --train-data ...
"""

import runpy

from . import open_clip

if __name__ == "__main__":
    open_clip.apply()
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
