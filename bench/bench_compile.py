"""What the compiler makes of every Triton kernel, for eight targets. No GPU, no peers.

    python bench/bench_compile.py --json compile.jsonl

``registers`` and ``spilled`` are per thread (bytes of stack and local memory, scratch on AMD),
``shared`` is bytes per program, ``instructions`` are static, of PTX (of machine code on AMD),
``float64`` those of them that compute in float64. A spill, shared memory beyond what the target
has or a float64 instruction is a fault: the exit status is 1 then. ``--quick`` compiles for sm_90
only. ``--peers`` is taken, as by all benches, and compares with nobody.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import aot
import aot_variants
import harness

UNITS = {
    "registers": "register",
    "spilled": "byte",
    "shared": "byte",
    "instructions": "instruction",
    "float64": "instruction",
}


def main() -> None:
    parser = harness.parser(__doc__, ["trl", "liger_kernel", "cut_cross_entropy"])
    args = parser.parse_args()
    targets = ["sm_90"] if args.quick else list(aot.TARGETS)
    where = harness.about()
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-compile-") as cache:
        # Its own, so that a compiler that is tried out leaves nothing behind.
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        variants = aot_variants.all_variants()
        width = max(len(variant.name) for variant in variants)
        print(f"compile\n{where['machine']}; commit {where['commit']}")
        print(", ".join(f"{name} {version}" for name, version in where["versions"].items()))
        print("variant".ljust(width), "target ", *(f"{name:>12}" for name in UNITS), sep="  ")
        for variant in variants:
            for target in targets:
                if aot.TARGETS[target].card not in variant.cards:
                    continue  # it is not launched there
                found = aot.compiled(variant, aot.TARGETS[target])
                figures = asdict(found)
                print(
                    variant.name.ljust(width),
                    f"{target:<7}",
                    *(f"{figures[name]:>12,}" for name in UNITS),
                    sep="  ",
                    flush=True,
                )
                case = f"{variant.name}, {target}"
                faults += [f"{case}: {fault}" for fault in found.faults(aot.TARGETS[target])]
                rows += [
                    {
                        "bench": "compile",
                        "case": case,
                        "impl": harness.OURS,
                        "metric": metric,
                        "value": figures[metric],
                        "unit": unit,
                    }
                    | where
                    for metric, unit in UNITS.items()
                ]
    if args.json is not None:
        harness.write(rows, args.json)
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
