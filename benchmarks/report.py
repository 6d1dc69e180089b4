"""What the kernels become on GPUs that need not be here: `python kernels.py --report [sm_90 ...]` runs this file.

Triton compiles for any GPU. Here it compiles what a launch would, for 8 KV heads and rows of up to 32768 tokens, and
says what one SM gets: registers and bytes of them spilled a thread, shared memory a program, how many programs fit, how
many bytes of cache or weights they have in flight, and the loads a thread issues in a turn of the kernel's loop."""
import argparse
import collections
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels
from kernels import triton

SMEM = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100, "gfx942": 64}  # KB per SM

FLASH_DECODE = ("bf16 D=128 G=4 T=1", "bf16 D=128 G=4 T=1 read", "bf16 D=128 G=4 T=1 options", "bf16 D=64 G=8 T=1",
                "bf16 D=256 G=2 T=1", "bf16 D=128 G=4 T=5", "bf16 D=128 G=8 T=8", "fp16 D=80 G=1 T=1",
                "fp32 D=128 G=4 T=1", "int8 D=128 G=4 T=1", "int8 D=64 G=8 T=1", "int8 D=256 G=2 T=1",
                "int8 D=128 G=8 T=8")

# --- what is compiled: a kernel, its arguments, and the bytes of cache or weights that a turn of its loop reads ---

def tensor(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")

def flash_decode(name, smem):
    """A case of FLASH_DECODE on a GPU with smem bytes of shared memory per SM."""
    D, G, T = map(int, re.findall(r"=(\d+)", name))
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(name[:4], torch.bfloat16)
    cache, scales = tensor(dtype, 4, 8, 32768, D), None
    if name.startswith("int8"):
        cache, scales = cache.to(torch.int8), tensor(torch.float32, 4, 8, 32768)
    new = None if "read" in name else tensor(dtype, 4, 8, T, D)
    window, softcap, slopes, sinks = None, None, None, None
    if "options" in name:
        window, softcap, slopes, sinks = 4096, 50.0, tensor(torch.float32, 8 * G), tensor(torch.float32, 8 * G)
    blocks = kernels._blocks(cache.element_size(), D, G * T, smem)
    _, arguments = kernels._arguments(
        tensor(dtype, 4, 8 * G, T, D), cache, cache, tensor(torch.int32, 4), new, new, scales, scales, None, True,
        window, softcap, slopes, sinks, blocks, 264)
    arguments["counter_ptr"] = tensor(torch.int32, 4096)
    return kernels._flash_decode_kernel, arguments, 2 * blocks["BLOCK_N"] * D * cache.element_size()

def linear(group=None):
    """int4_linear with groups of that many inputs, or int8_linear, for any number N of outputs."""
    N, K = 4097, 14336  # a multiple of 16 would be known to the compiler
    if group:
        scales = tensor(torch.bfloat16, N, K // group)
        weights = tensor(torch.uint8, N, K // 2), scales, scales
    else:
        weights = tensor(torch.int8, N, K), tensor(torch.bfloat16, N)
    kernel, _, arguments = kernels._linear_arguments(tensor(torch.bfloat16, 1, K), *weights)
    return kernel, arguments, 8 * 1024 // (2 if group else 1)

def cases(smem):
    for name in FLASH_DECODE:
        yield f"flash_decode {name}", *flash_decode(name, smem)
    yield "int8_linear", *linear()
    for group in (32, 128):
        yield f"int4_linear group={group}", *linear(group)

# --- what becomes of it ---

def compile_for(arch, kernel, arguments):
    """What Triton would launch on a GPU of that kind."""
    target = ("hip", arch, 64) if arch.startswith("gfx") else ("cuda", int(arch[3:]), 32)
    triton.runtime.driver.set_active(types.SimpleNamespace(  # the part of a driver that compiling asks for
        get_current_device=lambda: arch, get_current_stream=lambda device: None,
        get_current_target=lambda: triton.backends.compiler.GPUTarget(*target)))
    for x in arguments.values():
        if isinstance(x, torch.Tensor):
            x.ptr_range = lambda: 2 ** 31  # AMD's compiler asks: a cache may be that large
    return kernel.warmup(grid=(1,), **arguments)

def registers_and_spills(compiled):
    """Registers of a thread, and bytes of them that did not fit."""
    if "amdgcn" in compiled.asm:
        usage, names = compiled.asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size")
    else:
        tool, names = Path(triton.backends.__path__[0]) / "nvidia/bin/cuobjdump", ("REG", "STACK")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"\b{name}:\s*(\d+)", usage)[1]) for name in names]

def load_size(line):
    """Bytes that a line of assembly loads from global memory, 0 if it is something else."""
    if load := re.search(r"cp\.async\.c[ag].*?, 0x(\w+)", line):
        return int(load[1], 16)
    if load := re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bu](\d+)\s", line):
        return int(load[1] or 1) * int(load[2]) // 8
    if load := re.search(r"(?:global|buffer)_load_(dword|\w)(?:x(\d))?", line):
        return {"dword": 4, "u": 2, "s": 2}[load[1]] * int(load[2] or 1)
    return 0

def loads_in_loop(asm):
    """How many loads of each size the first loop that has any makes; LLVM's comments say which blocks are a loop."""
    loops, block, loop = collections.defaultdict(collections.Counter), None, None
    for line in asm.splitlines():
        if label := re.match(r"[$.L_;/ %]*((?:BB|bb)[\d._]+)", line):
            block, loop = label[1], None
        if "Loop" in line:
            header = re.search(r"Header=(\w+)", line)
            loop = header[1] if header else block
        if loop and (size := load_size(line)):
            loops[loop][size] += 1
    return next(iter(loops.values()), collections.Counter())

def report(archs):
    """Print what every kernel becomes; 1 if one spills registers or reads cache or weights by less than 16 bytes."""
    failed = 0
    print(f"{'GPU':7}{'kernel':40}registers  spilled  shared KB  programs/SM  KB in flight/SM  loads in its loop")
    for arch in archs:
        for name, kernel, arguments, needed in cases(SMEM[arch] * 1024):
            compiled = compile_for(arch, kernel, arguments)
            asm, shared = compiled.asm.get("ptx") or compiled.asm["amdgcn"], compiled.metadata.shared
            registers, spilled = registers_and_spills(compiled)
            threads = compiled.metadata.num_warps * compiled.metadata.warp_size
            register_file = 131072 if arch.startswith("gfx") else 65536
            programs = min(SMEM[arch] * 1024 // (shared + 1024), register_file // (registers * threads))
            in_flight = programs * needed * (arguments.get("num_stages", 4) - 1)
            loads = loads_in_loop(asm)
            dots = re.findall(r"v_mfma_\w+|(?:wgmma|tcgen05)\.mma|mma\.sync\.aligned\.m\w+", asm)
            wrong = "SPILLS " * (spilled > 0) + "NARROW LOADS" * (loads[16] * 16 * threads < needed)
            print(f"{arch:7}{name:40}{registers:9}{spilled:9}{shared / 1024:11.1f}{programs:13}{in_flight // 1024:17} ",
                  ", ".join(f"{loads[size]} x {size} B" for size in sorted(loads, reverse=True)),
                  *sorted(set(dots)), wrong, flush=True)
            failed |= bool(wrong)
    return failed

if __name__ == "__main__":
    parser = argparse.ArgumentParser("kernels.py", description=(
        "Compile the kernels ahead of time, for GPUs that need not be here."))
    parser.add_argument("--report", nargs="*", metavar="GPU", required=True, choices=SMEM, help="%(choices)s, or all")
    gpus = parser.parse_args().report or SMEM
    if not triton:
        parser.error("the report needs Triton")
    sys.exit(report(gpus))
