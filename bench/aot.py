"""Kernels compiled ahead of time, without a GPU: what each takes of each target, and what is wrong.

Not in a process under ``TRITON_INTERPRET=1``, whose kernels cannot be compiled.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton
from aot_variants import AMD, NVIDIA, TURING, Variant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fusedgrpo.kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Target:
    """shared_limit: bytes of shared memory (LDS) that one program may take.

    Triton itself compares with it only when it loads a kernel on a GPU.
    """

    gpu: GPUTarget
    shared_limit: int
    card: str = NVIDIA  # its kind, of ``aot_variants.CARDS``


def _cuda(capability: int, shared_limit: int, card: str = NVIDIA) -> Target:
    return Target(GPUTarget("cuda", capability, 32), shared_limit, card)


TARGETS = {
    "sm_75": _cuda(75, 65_536, TURING),
    "sm_80": _cuda(80, 166_912),
    "sm_86": _cuda(86, 101_376),
    "sm_89": _cuda(89, 101_376),
    "sm_90": _cuda(90, 232_448),
    "sm_100": _cuda(100, 232_448),
    "sm_120": _cuda(120, 101_376),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, AMD),
}


@dataclass(frozen=True)
class Resources:
    """What one compilation takes.

    registers: per thread. spilled: bytes of stack and local memory per thread, where registers
    that did not fit go. shared: bytes per program. instructions: static, of PTX (of machine code on
    AMD). float64: those of them that compute in float64.
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    float64: int

    def faults(self, target: Target) -> list[str]:
        """In words, what keeps this from running well or at all. Empty if nothing does."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} B")
        if self.shared > target.shared_limit:
            found.append(f"takes {self.shared} of {target.shared_limit} B shared memory")
        if self.float64:
            found.append(f"has {self.float64} float64 instructions")
        return found


def kernel_modules() -> list[ModuleType]:
    """The modules of ``fusedgrpo.kernels`` that hold Triton kernels."""
    names = sorted(
        module.name
        for module in pkgutil.walk_packages(fusedgrpo.kernels.__path__, "fusedgrpo.kernels.")
    )
    return [importlib.import_module(name) for name in names if name.endswith("_triton")]


def compiled(variant: Variant, target: Target) -> Resources:
    names = list(variant.signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, aligned)
    kernel = triton.compile(source, target=target.gpu, options=variant.launch.options())
    if target.gpu.backend == "hip":
        return amd_resources(kernel.asm["amdgcn"], kernel.metadata.shared)
    ptx = kernel.asm["ptx"]
    registers, spilled = _nvidia(kernel.asm["cubin"])
    return Resources(
        registers,
        spilled,
        kernel.metadata.shared,
        instructions=len(re.findall(r"^\s+(?:@!?%\w+ )?[a-z][\w.:]*\b.*;", ptx, re.M)),
        float64=len(re.findall(r"\.f64\b", ptx)),
    )


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def amd_resources(assembly: str, shared: int) -> Resources:
    """Of the assembly with the metadata at its end; shared: what Triton says."""

    def field(name: str) -> int:
        match = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.M)
        if match is None:
            raise ValueError(f"the assembly does not say its .{name}")
        return int(match[1])

    # A register may spill to an idle one of another kind, which takes no scratch.
    spilled = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
    return Resources(
        field("vgpr_count"),
        spilled,
        max(shared, field("group_segment_fixed_size")),
        instructions=len(re.findall(r"^\t[a-z]\w+(?:\s|$)", assembly, re.M)),
        float64=len(re.findall(r"^\t\w+_f64", assembly, re.M)),
    )


def reduction_layouts(variant: Variant, target: Target) -> tuple[str, ...]:
    """How the operands of the variant's reductions are spread over threads, each layout once.

    Compiled for pointers and integers that are multiples of 16, as large tensors have them.
    """
    runtime = [i for i, kind in enumerate(variant.signature.values()) if kind != "constexpr"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in runtime}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, aligned)
    text = triton.compile(source, target=target.gpu, options=variant.launch.options()).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", text, re.M))
    used = re.findall(r"\}\) : \(tensor<\d+x\w+, (#\w+)>\)", text)
    return tuple(sorted({layouts[name] for name in used}))
