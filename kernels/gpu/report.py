"""What a compiler makes of every Triton kernel in every tuned configuration, for GPUs that need not be there.

    python -m seqzoo.kernels.gpu.report                       all ops, sm_80, sm_90, sm_100 and gfx942
    python -m seqzoo.kernels.gpu.report --ops short_conv --arches sm_90
    python -m seqzoo.kernels.gpu.report --known benchmarks/results/kernels.json --again 8

A row is one kernel as it would be started: registers, bytes spilled, shared memory, and how its matrix products are
done. The command fails where a configuration spills, needs more shared memory than the chip has, or leaves a product of
matrices to ordinary arithmetic; and where a table has a row that no example reaches.

All of them take a quarter of an hour. `--known` keeps the rows in a file, by all that a compiler sees of a kernel, and
builds only what is not in it; some of what is, chosen at random, is built `--again` and must come out the same.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.gpu import tables
from seqzoo.kernels.gpu.examples import examples, on_meta, ops
from seqzoo.kernels.gpu.launch import Launch, interpreted, recording

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Built(NamedTuple):
    """A kernel, compiled."""

    op: str
    example: str  # the first that starts it
    kernel: str
    arch: str
    config: dict[str, Any]  # constexprs and options
    registers: int  # per thread
    spilled: int  # [bytes] per thread, of stack: a kernel has no other use for it
    shared: int  # [bytes] per program
    units: str  # how matrices are multiplied, with the number of instructions
    left: int  # products of matrices that are done by ordinary arithmetic
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong with it."""
        most = 1024 * tables.SHARED[self.arch]
        return [
            *([self.error] if self.error else []),
            *([f"spills {self.spilled} bytes"] if self.spilled else []),
            *([f"needs {self.shared} bytes of shared memory, the chip has {most}"] if self.shared > most else []),
            *([f"{self.left} products do not reach the matrix units"] if self.left else []),
        ]


class Job(NamedTuple):
    """What to compile: a launch without its tensors, which another process can take."""

    op: str
    example: str
    module: str
    kernel: str
    arch: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]  # arguments that are divisible by 16, as started with sizes like the example's
    options: dict[str, int]


def described(op: str, example: str, arch: str, this: Launch) -> Job:
    """A launch as the compiler sees it: types, constants, and what is known to be divisible by 16."""
    names, values = this.kernel.arg_names, dict(zip(this.kernel.arg_names, this.arguments, strict=False))
    options = {name: value for name, value in this.constants.items() if name in OPTIONS}
    values |= {name: value for name, value in this.constants.items() if name not in OPTIONS}
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{op}: {this.kernel.__name__} is started without {', '.join(missing)}")
    signature, constants, aligned = {}, {}, []
    for n, parameter in enumerate(this.kernel.params):
        value = values[parameter.name]
        kind = _kind(value)
        one = kind in ("i32", "i64") and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind
        if kind[0] == "*" or (kind[0] == "i" and value % 16 == 0 and not parameter.do_not_specialize):
            aligned.append(n)
    module = sys.modules[this.kernel.fn.__module__].__name__
    return Job(op, example, module, this.kernel.__name__, arch, signature, constants, tuple(aligned), options)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def jobs(op: str, arch: str) -> tuple[list[Job], list[str]]:
    """Every kernel that the op's examples start on this architecture, each once; and the table's rows left over."""
    found: dict[str, Job] = {}
    with tables.for_arch(arch), tables.asking() as asked:
        for label, call in examples(op, on_meta):
            with recording() as launches:
                call()
            for this in launches:
                job = described(op, label, arch, this)
                found.setdefault(repr((job.module, *job[3:])), job)
    table = tables.table(op) if (tables.KERNELS / op / "tuned.json").exists() else {}
    rows = [(op, kernel, arch, n) for kernel, rows in table.items() for n in range(len(rows[arch]))]
    unused = [f"{op}: {kernel} {arch}: no example reaches row {n}" for _, kernel, _, n in set(rows) - set(asked)]
    return list(found.values()), sorted(unused)


def build(job: Job) -> Built:
    """Compile it and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    __import__(job.module)
    kernel = getattr(sys.modules[job.module], job.kernel)
    amd = job.arch.startswith("gfx")
    target = GPUTarget("hip", job.arch, 64) if amd else GPUTarget("cuda", int(job.arch[3:]), 32)
    attributes = {(n,): [["tt.divisibility", 16]] for n in job.aligned}
    config = {k: v for k, v in job.constants.items() if v is not None} | job.options
    head = (job.op, job.example, job.kernel, job.arch, {k: str(v) for k, v in config.items()})
    try:
        source = ASTSource(fn=kernel, signature=job.signature, constexprs=job.constants, attrs=attributes)
        compiled = triton.compile(source, target=target, options=job.options | dict(enable_fp_fusion=True))
        products = re.findall(r"tt\.dot .*", compiled.asm["ttgir"])
        left = sum("#blocked" in line.rsplit("->")[-1] for line in products)
        shared = compiled.metadata.shared
        registers, spilled, units = (_amd if amd else _nvidia)(compiled.asm)
    except Exception as error:  # whatever the compiler says is the report
        return Built(*head, 0, 0, 0, "", 0, f"{type(error).__name__}: {str(error).strip()[-300:]}")
    if "tt.dot" not in compiled.asm["ttir"]:
        units = "-"
    if units == "none":  # whatever became of the products: a kernel without any has once been compiled to nothing
        left = max(left, 1)
    return Built(*head, registers, spilled, shared, units, left)


def _nvidia(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers, spilled bytes and matrix instructions, of the binary and the PTX."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    patterns = dict(wgmma=r"wgmma\.mma_async", tcgen05=r"tcgen05\.mma", mma=r"(?<![.\w])mma\.sync")
    counts = {name: len(re.findall(pattern, asm["ptx"])) for name, pattern in patterns.items()}
    return registers, stack, " ".join(f"{name} {n}" for name, n in counts.items() if n) or "none"


def _amd(asm: dict[str, str]) -> tuple[int, int, str]:
    code = asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
    spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
    n = len(re.findall(r"v_mfma", code))
    return registers, spilled, f"mfma {n}" if n else "none"


def key(job: Job) -> str:
    """Of all that decides what a compiler makes of it: its source and what that calls, types, constants, Triton."""
    import triton

    kernel = getattr(sys.modules[job.module], job.kernel)
    seen = repr(job._replace(example="")), kernel.cache_key, triton.__version__
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def report(
    names: Sequence[str], arches: Sequence[str], workers: int, known: dict[str, Built], again: int
) -> Iterator[tuple[str, Built] | str]:
    """Keys and rows, as they come, and what is wrong beside them. `known` rows are taken as they are, but for some."""
    work: dict[str, Job] = {}
    for op in names:
        for arch in arches:
            found, unused = jobs(op, arch)
            work |= {key(job): job for job in found}
            yield from unused
    old = [k for k in work if k in known]
    anew = random.sample(old, min(again, len(old)))
    new = [k for k in work if k not in known] + anew
    yield from ((k, known[k]) for k in old if k not in anew)
    with ProcessPoolExecutor(workers) as pool:
        for k, built in zip(new, pool.map(build, [work[k] for k in new]), strict=True):
            yield k, built
            if k in known and built._replace(example="") != known[k]._replace(example=""):
                yield f"{built.op}: {built.kernel} {built.arch}: now {built}, in the file {known[k]}"


def read(path: Path | None) -> dict[str, Built]:
    """The rows in a file, by key; none where it is not there yet."""
    if path is None or not path.exists():
        return {}
    return {k: Built(**row) for k, row in json.loads(path.read_text()).items()}


def write(path: Path, rows: dict[str, Built]) -> None:
    """A row a line, whole or not at all."""
    lines = (f"{json.dumps(k)}: {json.dumps(row._asdict())}" for k, row in sorted(rows.items(), key=lambda x: x[1][:4]))
    beside = path.with_suffix(".partial")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(beside, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=ops(), choices=ops())
    parser.add_argument("--arches", nargs="+", default=list(ARCHES), choices=tables.ARCHES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--known", type=Path, help="take rows from this file, and write it anew")
    parser.add_argument("--again", type=int, default=0, help="how many of those to build all the same")
    options = parser.parse_args(arguments)
    if interpreted():
        raise SystemExit("report: TRITON_INTERPRET is set, and what is interpreted cannot be compiled: unset it")
    known, rows, faults = read(options.known), {}, []
    print(f"{'kernel':36} {'arch':7} {'regs':>4} {'spill':>5} {'shared':>7}  {'matrix units':14} configuration")
    for found in report(options.ops, options.arches, options.workers, known, options.again):
        if isinstance(found, str):
            faults.append(found)
            continue
        rows[found[0]] = row = found[1]
        config = " ".join(f"{name}={value}" for name, value in row.config.items())
        name = f"{row.op}.{row.kernel.strip('_')}"
        print(f"{name:36} {row.arch:7} {row.registers:4} {row.spilled:5} {row.shared:7}  {row.units:14} {config}")
        faults += [f"{name} {row.arch} ({row.example}; {config}): {fault}" for fault in row.faults()]
    if options.known:
        rest = {k: row for k, row in known.items() if row.op not in options.ops or row.arch not in options.arches}
        write(options.known, rest | rows)
    print(f"\n{len(rows)} kernels, {sum(k not in known for k in rows)} of them built anew, {len(faults)} faults")
    print(*faults, sep="\n")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
