"""Each expert's rows by its own matrix, on a GPU: by torch where that is fast and waits for nothing, else by Triton.

torch's is for bfloat16 on sm_90 and sm_100; elsewhere it is a loop on the host over sizes it must first ask the device
for. So is what is left to it here: float32 products that are to be exact, and a CPU.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.expert_mlp.grouped import _can_group, _grouped, _one_by_one
from seqzoo.kernels.gpu import launch, products, takes, tuned


def in_triton(rows: Tensor, matrices: Tensor) -> bool:
    """Whether the product is ours."""
    if rows.device.type != "cuda" or not takes(rows):
        return False
    torchs = rows.dtype == torch.bfloat16 and _can_group(rows, matrices) and not torch.version.hip
    return not (torchs and torch.cuda.get_device_capability(rows.device)[0] in (9, 10))


def product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [R, A], matrices [E, C, A] of any strides, ends [E] int32 behind each expert's last row -> [R, C]."""
    if in_triton(rows, matrices):
        return start_rows(rows.contiguous(), matrices, ends)
    return (_grouped if _can_group(rows, matrices) else _one_by_one)(rows, matrices, ends)


def matrices_gradient(d: Tensor, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Of `product`, for d [R, C]: like matrices."""
    if in_triton(rows, matrices):
        return start_matrices(d.contiguous(), rows.contiguous(), matrices, ends)
    if _can_group(rows, matrices):
        return F.grouped_mm(d.mT, rows, offs=ends)
    parts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.stack([a.mT @ b for a, b in zip(d.split(parts), rows.split(parts), strict=True)])


def start_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`product` in Triton."""
    from triton import next_power_of_2

    from seqzoo.kernels.expert_mlp.gpu_product import product_rows

    (R, A), (E, C) = rows.shape, matrices.shape[:2]
    out, config = rows.new_empty(R, C), tuned("expert_mlp", "product", rows.device, rows.dtype, width=max(A, C))
    BM = config["BM"]
    tiles = -(-ends.diff(prepend=ends.new_zeros(1)) // BM)
    programs = (-(-R // BM) + min(E, R)) * -(-C // config["BN"])  # an expert's last tile may hold few rows
    tensors = rows, matrices, out, tiles.cumsum(0, dtype=torch.int32), ends
    if R:
        sizes = dict(E=E, EP=next_power_of_2(E), A=A, C=C)
        launch(product_rows, (programs,), *tensors, *matrices.stride(), **sizes, **products(rows), **config)
    return out


def start_matrices(d: Tensor, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`matrices_gradient` in Triton."""
    from seqzoo.kernels.expert_mlp.gpu_product import product_matrices

    E, C, A = matrices.shape
    out, config = rows.new_empty(E, C, A), tuned("expert_mlp", "matrices", rows.device, rows.dtype, width=max(A, C))
    programs = E * -(-C // config["BM"]) * -(-A // config["BN"])
    launch(product_matrices, (programs,), d, rows, out, ends, A=A, C=C, **products(rows), **config)
    return out


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    for R, E, C, A, dtype in ((40960, 512, 1024, 2048, torch.bfloat16), (32768, 64, 512, 1024, torch.float32)):
        rows, matrices, ends = make((R, A), dtype), make((E, C, A), dtype), make((E,), torch.int32)
        d, name = make((R, C), dtype), f"{E} experts of {C} x {A}, {dtype}"
        yield f"product {name}", lambda x=(rows, matrices, ends): start_rows(*x)
        yield f"product back {name}", lambda x=(d, matrices.mT, ends): start_rows(*x)
        yield f"matrices {name}", lambda x=(d, rows, matrices, ends): start_matrices(*x)
