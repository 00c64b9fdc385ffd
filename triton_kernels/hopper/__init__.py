"""Kernels in Gluon, Triton's lower language, for Hopper GPUs (sm_90) and features in half precision.

Here a program's warps have parts. One warp, the producer, moves features into shared memory by TMA and does nothing
else; two groups of four warps, the consumers, form products (wgmma) and epilogues, and while one group forms its
epilogue the other's products run.

    ring.py         what the producer loads and consumers take, in which order; the exponential
    sums.py         sweep 1 of a softmax, in place of ``..sums.sums_kernel``
    weights.py      sweep 2: W, in place of ``..gradients.resident_weights_kernel``
    gradients.py    sweep 2 for narrow features: W stays in registers, and its products are summed there
    launch.py       the launchers

The softmax alone (CLIP, InfoNCE) and SupCon (NT-Xent) have these: elsewhere the exponential is not what a tile waits
for. Triton has no interpreter for Gluon; tests/gluon_interpreter.py runs the sources as they are on a CPU, in random
orders of events.
"""
