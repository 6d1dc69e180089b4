"""What `python kernels.py --report` says of the kernels, compiled for GPUs that need not be here,
and `python benchmarks/report.py --step` of a whole decode step."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checks.common import CPU_ENV, HERE, ours

pytest.importorskip("triton")


def python(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """python, with Triton compiling as it does for users, in the repository's folder."""
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=HERE, env=CPU_ENV, capture_output=True, text=True)

# --- the kernels ---


def test_report() -> None:
    """No kernel spills registers, and all read caches and weights by 16 bytes."""
    done = python("kernels.py", "--report", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 41
    assert all(line.startswith("sm_90 ") for line in lines)
    no_loop = "dense_weight", "delta_rule"
    lines = [line for line in lines if not any(name in line for name in no_loop)]
    assert all("16 B" in line for line in lines)
    not_on_tensor_cores = [line for line in lines if "mma" not in line]
    assert len(not_on_tensor_cores) == 1
    assert "flash_decode fp32" in not_on_tensor_cores[0]
    # few enough instructions that memory is what it waits for, and an early start
    before, a_byte = re.search(r" (\d+) +([\d.]+) +16 x 16 B", lines[0]).groups()
    assert int(before) < 600
    assert float(a_byte) < 1.5


def test_report_for_amd() -> None:
    """Launches of their own append and sum."""
    done = python("kernels.py", "--report", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert sum(", append " in line for line in lines) == 14  # all but the one that only reads
    assert sum(", sum " in line for line in lines) == 15


def test_report_of_a_gpu_it_does_not_know() -> None:
    done = python("kernels.py", "--report", "sm_70")
    assert done.returncode == 2
    assert "invalid choice: 'sm_70'" in done.stderr
    assert not done.stdout


# VEC=1: nothing is known of the strides; maxnreg=64: too few registers
REPORT_OF_BAD_KERNELS = """
import sys
sys.path.insert(0, "benchmarks")
import report
name, kernel, arguments, needed = next(report.cases("sm_80"))
narrow = name, kernel, arguments | dict(VEC=1), needed
spilling = name, kernel, arguments | dict(maxnreg=64), needed
report.cases = lambda arch: [narrow, spilling]
raise SystemExit(report.report(["sm_80"]))
"""


def test_report_sees_narrow_loads_and_spills() -> None:
    done = python("-c", REPORT_OF_BAD_KERNELS)
    assert done.returncode == 1, done.stderr
    narrow, spilling = done.stdout.splitlines()[1:]
    assert "NARROW LOADS" in narrow
    assert "SPILLS" not in narrow
    assert "SPILLS" in spilling


# a loop of five instructions that loads ahead into shared memory, two loads before it, and a loop
# after it
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], P1 ;
.L_x_0:
        /*0040*/                   LDS.128 R4, [R9] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64], P1 ;
        /*0060*/                   LDGSTS.E [R9+0x10], desc[UR4][R6.64], P1 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0080*/              @!P2 BRA `(.L_x_0) ;
.L_x_1:
        /*0090*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00a0*/              @!P3 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""
COUNT = """
import sys
sys.path.insert(0, "benchmarks")
import report
print(*report.count_instructions(sys.argv[1]))
print(*report.count_instructions(sys.argv[1].replace("LDGSTS", "STS")))
"""


def test_report_counts_instructions() -> None:
    done = python("-c", COUNT, SASS)
    assert done.returncode == 0, done.stderr
    asynchronous, waiting = done.stdout.splitlines()
    assert asynchronous == "3 5 1"
    assert waiting == "1 2 1"


def test_a_copy_of_the_file_has_no_report(tmp_path: Path) -> None:
    copy = shutil.copy(HERE / "kernels.py", tmp_path)
    done = python(copy, "--report")
    assert done.returncode == 2
    assert "--report needs " in done.stderr
    assert ours(done.stderr).count("\n") == 1


REPORT_WITHOUT_TRITON = """
import runpy
import sys
sys.modules["triton"] = None
sys.argv = ["kernels.py", "--report"]
runpy.run_path("kernels.py", run_name="__main__")
"""


def test_report_without_triton() -> None:
    done = python("-c", REPORT_WITHOUT_TRITON)
    assert done.returncode == 2, done.stderr
    assert "needs Triton" in done.stderr

# --- a decode step ---


# at most: launches in a layer, of the head, of the rest of the step
LAUNCHES = {
    "TinyLlama-1.1B bf16 kv=int8 flash B=1 S=2048": [8, 2, 7],
    "TinyLlama-1.1B int8 kv=int8 flash B=1 S=2048": [10, 2, 7],
    "TinyLlama-1.1B int4 kv=int8 flash B=1 S=2048": [10, 2, 7],
    "TinyLlama-1.1B bf16 kv=int8 math B=1 S=2048": [11, 2, 7],
    "TinyLlama-1.1B int8 kv=int8 math B=1 S=2048": [13, 2, 7],
    "TinyLlama-1.1B int4 kv=int8 math B=1 S=2048": [13, 2, 7],
    "TinyLlama-1.1B bf16 kv=int8 flash B=8 S=2048": [10, 2, 7],
    "TinyLlama-1.1B int8 kv=int8 flash B=8 S=2048": [10, 2, 7],
    "TinyLlama-1.1B int4 kv=int8 flash B=8 S=2048": [10, 2, 7],
}
GATE_UP = 2 * 5632  # outputs, of the widest product in a layer
VOCAB_SIZE = 32000


def step_report(*words: str) -> dict[str, str]:
    """The variants that have these words in their names, and what the report says of them."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = python("benchmarks/report.py", "--step", *words)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ") for line in done.stdout.splitlines())


def test_what_a_step_launches() -> None:
    """No more than it needs to, alike in all layers, and no buffer larger than its activations;
    math has its scores too."""
    lines = step_report("TinyLlama", "kv=int8", "flash")
    lines |= step_report("TinyLlama", "kv=int8", "math", "B=1")
    assert lines.keys() == LAUNCHES.keys()
    for variant, most in LAUNCHES.items():
        line = lines[variant]
        counts = re.search(r"^layer (\d+) = .*; head (\d+), rest (\d+);", line).groups()
        assert all(int(n) <= limit for n, limit in zip(counts, most)), line
        sizes = re.search(r"buffers (\S+) and (\S+) MB, cache (\S+) MB", line).groups()
        in_layer, in_head, cache = map(float, sizes)
        batch = int(re.search(r"B=(\d+)", variant)[1])
        activation = 4e-6 * batch  # MB of float32 for each output
        in_flash_layer = GATE_UP * activation + 0.01
        assert in_layer <= (in_flash_layer if "flash" in variant else cache / 4), line
        assert in_head <= VOCAB_SIZE * activation + 0.01, line
        assert "kernels" in line  # they are seen
        assert ("+ 1 gpt_flash::flash_decode" in line) == ("flash" in variant)
        if " int8 kv" in variant and batch == 1:
            assert "+ 1 gpt_flash::quantized_linear" in line  # down_proj, behind an activation
        assert "clone" not in line
        assert line.endswith("graphs 2 + 0")  # a block and the head, and none in a second step


def test_a_layer_with_a_state_launches_one_kernel_for_it() -> None:
    """And convolution, norms of queries and keys, and what its rows keep are in it."""
    [line] = step_report("Qwen3.6", "bf16").values()
    first = re.search(r"the first has (\d+) = .*", line)
    assert int(first[1]) <= 18, line
    assert "+ 1 gpt_flash_delta::decode" in first[0]
    assert "clone" not in line
    assert "; graphs 3 + 0;" in line


def test_no_layer_of_an_int8_cache_is_copied() -> None:
    """Nor where B * Hkv * S is odd, so that scales without padding would start at any 4 bytes."""
    lines = step_report("SmolLM2", "kv=int8", "S=2047")
    assert len(lines) == 2
    for line in lines.values():
        assert "clone" not in line
        assert line.endswith("graphs 2 + 0")  # and the layers are alike
