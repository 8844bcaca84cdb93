"""Compiles toy kernels for GPUs that are not there and prints what the report finds wrong with each, as JSON.

A process of its own: the tests' has Triton's interpreter, in which nothing can be compiled.
"""

import json

import torch
import toy_kernels
import triton.language as tl

from seqzoo.kernels.gpu import launch, recording
from seqzoo.kernels.gpu.report import build, described


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def built(kernel, *arguments, arch="sm_90", **constants):
    with recording() as launches:
        launch(kernel, (1,), *arguments, **constants)
    return build(described("toy", "example", arch, launches[0]))


def product(N, **more):
    square = empty(N, N, dtype=torch.bfloat16)
    return built(toy_kernels.product, square, square, empty(N, N), N=N, DOT=tl.bfloat16, num_warps=4, **more)


print(json.dumps({
    "plain": built(toy_kernels.scale, empty(100), empty(100), 100, BLOCK=64, num_warps=1)._asdict(),
    "products": product(64)._asdict(),
    "too wide": product(256).faults(),
    "too small": product(8).faults(),
    "undone": product(8, arch="gfx942").faults(),
}))  # fmt: skip
