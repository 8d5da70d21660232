"""Cases of every op for `gpu.py`, one file per op, under the op's name: `cases(kernels, inputs, full=...)`.

full: the sizes of models that are served; otherwise tiny ones, which Triton's interpreter can run.
"""
