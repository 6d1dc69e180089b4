"""What the kernels become on GPUs that need not be here: `python kernels.py --report [sm_90 ...]`
runs this file. What a whole decode step launches: `python benchmarks/report.py --step [WORD ...]`.

Triton compiles for any GPU. Here it compiles what a launch would, for 8 KV heads and rows of up to
32768 tokens, and says what one SM gets: registers and bytes of them spilled a thread, shared memory
a program, how many programs fit, how many bytes of cache or weights they have in flight, and the
loads a thread issues in a turn of the kernel's loop. For NVIDIA's, whose machine code can be read
here, also the instructions of a warp before it asks for its first cache or weights, those that only
some warps come to included, and the instructions of threads in the loop for each byte: an SM that
starts 128 a cycle and gets 19 bytes a cycle, as an H200's does, has 6.9 for each. AMD's appending
and summing kernels have lines of their own."""
from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels
from families import delta_rule
from kernels import triton
from products import linear

# KB of shared memory per SM
SMEM = {
    "sm_80": 164,
    "sm_86": 100,
    "sm_89": 100,
    "sm_90": 228,
    "sm_100": 228,
    "sm_120": 100,
    "gfx90a": 64,
    "gfx942": 64,
    "gfx950": 160,
    "gfx1100": 64,
}

FLASH_DECODE = (
    "bf16 D=128 G=4 T=1",
    "bf16 D=128 G=4 T=1 read",
    "bf16 D=128 G=4 T=1 options",
    "bf16 D=64 G=8 T=1",
    "bf16 D=256 G=2 T=1",
    "bf16 D=128 G=4 T=5",
    "bf16 D=128 G=8 T=8",
    "bf16 D=128 G=4 T=1 ring",
    "fp16 D=80 G=1 T=1",
    "fp32 D=128 G=4 T=1",
    "int8 D=128 G=4 T=1",
    "int8 D=64 G=8 T=1",
    "int8 D=256 G=2 T=1",
    "int8 D=128 G=8 T=8",
    "int8 D=128 G=4 T=1 ring",
)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.bfloat16,  # of what is not the cache
}

# --- the report ---


class Code(NamedTuple):
    """Instructions of a warp."""

    before: int  # until the first load of the kind that the loop makes
    in_loop: int  # in a turn of the loop
    loads: int  # of 16 bytes among them


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # of a thread
    spilled: int  # bytes of them that did not fit
    shared: int  # bytes of a program
    programs: int  # on an SM at once
    in_flight: int  # bytes of cache or weights that they wait for
    loads: Counter[int]  # how many of each size a thread issues in a turn of the loop
    dots: list[str]  # instructions of the tensor cores
    code: Code | None  # what the machine code tells, where it can be read
    per_byte: float  # instructions of threads for each byte that the loop loads
    wrong: list[str]


def report(archs: Iterable[str]) -> int:
    """Print what every kernel becomes; 1 if one spills registers or reads cache or weights by less
    than 16 bytes."""
    failed = 0
    print(f"{'GPU':8}{'kernel':44}registers  spilled  shared KB  programs/SM  KB in flight/SM"
          "  instructions before  a byte  loads in its loop")
    for arch in archs:
        for name, kernel, arguments, needed in cases(arch):
            compiled = compile_for(arch, kernel, arguments)
            stages = arguments.get("num_stages", 3)
            usage = usage_of(compiled, arch, needed, stages)
            print(f"{arch:8}{name:44}{row(usage)}", flush=True)
            if usage.wrong:
                failed = 1
    return failed


def row(usage: Usage) -> str:
    """A line of the report, without its first two columns."""
    sizes = sorted(usage.loads, reverse=True)
    loads = [f"{usage.loads[size]} x {size} B" for size in sizes]
    numbers = (
        f"{usage.registers:9}"
        f"{usage.spilled:9}"
        f"{usage.shared / 1024:11.1f}"
        f"{usage.programs:13}"
        f"{usage.in_flight // 1024:17}"
    )
    if usage.code:
        numbers += f"{usage.code.before:21}{usage.per_byte:8.2f} "
    else:
        numbers += f"{'-':>21}{'-':>8} "
    return " ".join([numbers, ", ".join(loads), *usage.dots, " ".join(usage.wrong)])


def usage_of(compiled: Any, arch: str, needed: int, stages: int) -> Usage:
    """needed: bytes of cache or weights that a turn of the kernel's loop reads; stages: how many
    turns ahead it loads, less one."""
    asm = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spilled = registers_and_spills(compiled)
    threads = compiled.metadata.num_warps * compiled.metadata.warp_size
    # the programs that an SM's shared memory and registers have room for
    shared = compiled.metadata.shared
    by_memory = SMEM[arch] * 1024 // (shared + 1024)
    register_file = 131072 if arch.startswith("gfx") else 65536
    by_registers = register_file // (registers * threads)
    programs = min(by_memory, by_registers)
    # everything should come by 16 bytes
    loads = loads_in_loop(asm)
    wrong = []
    if spilled:
        wrong.append("SPILLS")
    if loads[16] * 16 * threads < needed:
        wrong.append("NARROW LOADS")
    # a turn of the loop in machine code may be several of the kernel's
    code = None
    per_byte = math.nan
    if "cubin" in compiled.asm and needed:
        code = count_instructions(disassemble(compiled))
        turns = code.loads / loads[16] if loads[16] else 1
        per_byte = code.in_loop * threads / (needed * turns)
    dots = re.findall(r"v_(?:mfma|wmma)_\w+|(?:wgmma|tcgen05)\.mma|mma\.sync\.aligned\.m\w+", asm)
    return Usage(
        registers=registers,
        spilled=spilled,
        shared=shared,
        programs=programs,
        in_flight=programs * needed * (stages - 1),
        loads=loads,
        dots=sorted(set(dots)),
        code=code,
        per_byte=per_byte,
        wrong=wrong,
    )

# --- what is compiled ---


# a kernel's name, the kernel, its arguments, and the bytes of cache or weights that a turn of its
# loop reads
Case = tuple[str, Any, dict[str, Any], int]


def cases(arch: str) -> Iterator[Case]:
    """What is launched on a GPU of that kind."""
    for name in FLASH_DECODE:
        yield from flash_decode(name, arch)
    for rows in (1, 4, 8, 16):
        yield int8_linear(rows, arch)
        yield int4_linear(rows, 32, arch)
    yield int4_linear(1, 64, arch)
    yield int4_linear(1, 128, arch)
    for rows in (1, 8, 16):
        for form in ("bf16", "int8", "int4", "mxfp4"):
            yield experts_linear(form, rows)
    for form in ("int4", "mxfp4"):
        yield dense_weight(form)
    for tokens in (1, 4):
        yield delta_rule_decode(tokens)


def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def flash_decode(name: str, arch: str) -> Iterator[Case]:
    """The kernels of a case of FLASH_DECODE."""
    D, G, T = [int(number) for number in re.findall(r"=(\d+)", name)]
    dtype = DTYPES[name[:4]]
    q = tensor(dtype, 4, 8 * G, T, D)
    lens = tensor(torch.int32, 4)
    cache = tensor(dtype, 4, 8, 32768, D)
    scales = None
    if name.startswith("int8"):
        cache = cache.to(torch.int8)
        scales = tensor(torch.float32, 4, 8, 32768)
    new = tensor(dtype, 4, 8, T, D)
    if "read" in name:
        new = None
    window = softcap = slopes = sinks = None
    ring = "ring" in name
    if ring:
        window = 32768 - 16
    if "options" in name:
        window = 4096
        softcap = 50.0
        slopes = tensor(torch.float32, 8 * G)
        sinks = tensor(torch.float32, 8 * G)
    blocks = kernels._blocks(cache.element_size(), D, G * T, SMEM[arch] * 1024, warp_size(arch))
    scale = None
    causal = True
    programs = 264
    arguments = kernels._arguments(
        q, cache, cache, lens, new, new, scales, scales, scale, causal,
        window, softcap, slopes, sinks, ring, blocks, programs,
    )
    counters = None if arch.startswith("gfx") else tensor(torch.int32, 4096)
    for kernel, _, arguments in kernels._launches(arguments, counters):
        if kernel is kernels._flash_decode_kernel:
            needed = 2 * blocks["BLOCK_N"] * D * cache.element_size()
            yield f"flash_decode {name}", kernel, arguments, needed
        else:
            part = kernel.__name__.strip("_").removesuffix("_kernel")
            yield f"flash_decode {name}, {part}", kernel, arguments, 0


# inputs, and any number of outputs: a multiple of 16 would be known to the compiler
K = 14336
N = 4097


def linear_arguments(arch: str, *tensors: Tensor) -> tuple[Any, dict[str, Any]]:
    """The kernel and its arguments, on a GPU of 132 SMs."""
    n_sm = 0 if arch.startswith("gfx") else 132
    kernel, grid, arguments = linear._linear_arguments(*tensors, n_sm=n_sm)
    if grid[2] > 1:
        arguments["counter_ptr"] = tensor(torch.int32, grid[0])
    return kernel, arguments


def int8_linear(rows: int, arch: str) -> Case:
    x = tensor(torch.bfloat16, rows, K)
    w = tensor(torch.int8, N, K)
    scales = tensor(torch.bfloat16, N)
    kernel, arguments = linear_arguments(arch, x, w, scales)
    needed = arguments["BLOCK_N"] * arguments["CHUNKS"] * arguments["CHUNK"]
    return f"int8_linear rows={rows}", kernel, arguments, needed


def int4_linear(rows: int, group: int, arch: str) -> Case:
    """With a scale and a zero for so many inputs."""
    x = tensor(torch.bfloat16, rows, K)
    packed = tensor(torch.int8, N, K // 64, 32)
    lines = tensor(torch.int32, 1, N, K // group)
    if group == 32:
        lines = tensor(torch.int32, 2, N, K // 64)
    kernel, arguments = linear_arguments(arch, x, packed, lines)
    needed = arguments["BLOCK_N"] * arguments["BLOCKS"] * 32
    return f"int4_linear rows={rows} group={group}", kernel, arguments, needed


def experts_linear(form: str, rows: int) -> Case:
    """Of 128 experts, of which each row has 8."""
    E = 128
    K = 2880  # gpt-oss's
    x = tensor(torch.bfloat16, rows, K)
    ids = tensor(torch.int64, rows, 8)
    w, scales = experts(form, E, K)
    kernel, _, arguments = linear._linear_arguments(x, w, scales, ids)
    outputs = arguments["BLOCK_N"]
    if "BLOCKS" in arguments:
        needed = outputs * arguments["BLOCKS"] * 32
    else:
        needed = outputs * arguments["CHUNKS"] * arguments["CHUNK"] * w.element_size()
    return f"experts_linear {form} rows={rows}", kernel, arguments, needed


def experts(form: str, E: int, K: int) -> tuple[Tensor, Tensor | None]:
    """A stack of E weights with K inputs."""
    packed = tensor(torch.int8, E, N, K // 64, 32)
    return {
        "bf16": (tensor(torch.bfloat16, E, N, K), None),
        "int8": (tensor(torch.int8, E, N, K), tensor(torch.bfloat16, E, N)),
        "int4": (packed, tensor(torch.int32, E, 2, N, K // 64)),
        "mxfp4": (packed, tensor(torch.uint8, E, N, K // 32)),
    }[form]


def dense_weight(form: str) -> Case:
    """Without a loop: its loads are not told."""
    w, scales = experts(form, 128, 2880)
    kernel, _, arguments = linear._dense_arguments(w, scales, 2880, torch.bfloat16, 1)
    return f"dense_weight {form}", kernel, arguments, 0


def delta_rule_decode(tokens: int) -> Case:
    """Of Qwen3.6-35B-A3B. Without a loop over its state: its loads are not told."""
    heads = 16, 32
    sizes = 128, 128
    C = 8192
    kernel = C, 4
    memory = delta_rule.Memory.allocate(4, heads, sizes, kernel, torch.bfloat16, "meta")
    x = tensor(torch.bfloat16, 4, tokens, C)
    g = tensor(torch.float32, 4, tokens, 32)
    weight = tensor(torch.bfloat16, *kernel)
    position = tensor(torch.int32, 4)
    arguments = delta_rule.kernel_arguments(x, g, g, weight, position, memory)
    return f"delta_rule T={tokens}", delta_rule._decode_kernel, arguments, 0

# --- what becomes of it ---


def warp_size(arch: str) -> int:
    """64 on AMD's CDNA, 32 on its RDNA and NVIDIA's."""
    return 64 if arch.startswith("gfx9") else 32


class Driver:
    """The part of a GPU's driver that compiling asks for."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> None:
        return None

    def get_current_target(self) -> Any:
        if self.arch.startswith("gfx"):
            return triton.backends.compiler.GPUTarget("hip", self.arch, warp_size(self.arch))
        capability = int(self.arch.removeprefix("sm_"))
        return triton.backends.compiler.GPUTarget("cuda", capability, 32)


def ptr_range() -> int:
    """AMD's compiler asks for a tensor's size: a cache may be that large."""
    return 2 ** 31


def compile_for(arch: str, kernel: Any, arguments: dict[str, Any]) -> Any:
    """What Triton would launch on a GPU of that kind."""
    triton.runtime.driver.set_active(Driver(arch))
    for x in arguments.values():
        if isinstance(x, Tensor):
            x.ptr_range = ptr_range
    return kernel.warmup(grid=(1,), **arguments)


def registers_and_spills(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that did not fit."""
    if "amdgcn" in compiled.asm:
        usage = compiled.asm["amdgcn"]
        return find_number("vgpr_count", usage), find_number("private_segment_fixed_size", usage)
    usage = read_cubin(compiled, "cuobjdump", "-res-usage")
    return find_number("REG", usage), find_number("STACK", usage)


def disassemble(compiled: Any) -> str:
    return read_cubin(compiled, "nvdisasm", "-c")


def read_cubin(compiled: Any, tool: str, option: str) -> str:
    """What one of the tools that come with Triton says of a kernel's machine code."""
    path = Path(triton.backends.__path__[0]) / "nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_number(name: str, text: str) -> int:
    return int(re.search(rf"\b{name}:\s*(\d+)", text)[1])


def load_size(line: str) -> int:
    """Bytes that a line of assembly loads from global memory, 0 if it is something else."""
    # cp.async.cg.shared.global [...], [...], 0x10, 0x10
    load = re.search(r"cp\.async\.c[ag].*?, 0x(\w+)", line)
    if load:
        return int(load[1], 16)
    # ld.global.v4.b32
    load = re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bu](\d+)\s", line)
    if load:
        return int(load[1] or 1) * int(load[2]) // 8
    # global_load_dwordx4, buffer_load_ushort
    load = re.search(r"(?:global|buffer)_load_[us]?(dword|short|byte)(?:x(\d))?", line)
    if load:
        size = {"dword": 4, "short": 2, "byte": 1}[load[1]]
        return size * int(load[2] or 1)
    # the same on gfx11 and later: global_load_b128, buffer_load_d16_u16
    load = re.search(r"(?:global|buffer)_load_(?:d16_)?(?:hi_)?[bui](\d+)", line)
    if load:
        return int(load[1]) // 8
    return 0


def loads_in_loop(asm: str) -> Counter[int]:
    """How many loads of each size the first loop that has any makes; LLVM's comments say which
    blocks are a loop."""
    loads = Counter()
    found = None  # the loop that they are counted in
    block = None
    loop = None
    for line in asm.splitlines():
        label = re.match(r"[$.L_;/ %]*((?:BB|bb)[\d._]+)", line)
        if label:
            block = label[1]
            loop = None
        if "Loop" in line:
            header = re.search(r"Header=(\w+)", line)
            loop = header[1] if header else block
        size = load_size(line)
        if loop and size:
            found = found or loop
            if loop == found:
                loads[size] += 1
    return loads


def count_instructions(sass: str) -> Code:
    """What disassembled machine code does: its loop is the shortest that loads from global memory,
    asynchronously if any does."""
    instructions = []
    labels = {}  # where each points
    for line in sass.splitlines():
        label = re.match(r"\s*\.(L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])

    # a loop ends with a branch back to where it starts
    loops = []
    for end, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", instruction)
        if branch and labels[branch[1]] < end:
            loops.append(instructions[labels[branch[1]]:end + 1])
    loops.sort(key=len)
    for load in (r"\bLDGSTS\b", r"\bLDG\b"):
        loading = [loop for loop in loops if any(re.search(load, x) for x in loop)]
        if loading:
            break
    loop = loading[0]
    wide = [x for x in loop if re.search(load, x) and re.search(r"\.128\b", x)]
    before = next(i for i, x in enumerate(instructions) if re.search(load, x))
    return Code(before, len(loop), len(wide))

# --- the command line ---


def main() -> int:
    prog = "kernels.py" if kernels.__name__ == "__main__" else "report.py"
    parser = argparse.ArgumentParser(prog, description=(
        "Compile the kernels, or a decode step, ahead of time, for GPUs that need not be here."))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--report", nargs="*", metavar="GPU", choices=SMEM, help="%(choices)s, or all")
    what.add_argument(
        "--step", nargs="*", metavar="WORD",
        help="what a compiled decode step launches, of the variants with these words, or of all")
    what.add_argument("--house", action="store_true", help="measures of the code itself")
    options = parser.parse_args()
    if options.house:
        import house
        house.main()
        return 0
    if not triton:
        parser.error("the report needs Triton")
    if options.step is None:
        return report(options.report or SMEM)
    import step  # which makes PyTorch believe in a GPU that is not there
    step.main(options.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
