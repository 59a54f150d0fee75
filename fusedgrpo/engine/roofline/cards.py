"""The speed of GPUs by the names that torch gives them."""

from __future__ import annotations

from dataclasses import dataclass

# From the host's call to the next: a customary figure for eager PyTorch, on no data sheet. What a
# recorded step takes for each of its kernels is less.
LAUNCH = 5e-6


@dataclass(frozen=True)
class Card:
    """flops: a second, of dense matrix products in 16 bit that are summed in float32. bandwidth:
    bytes a second of its memory. torch_names: as ``host.gpu_name`` says them."""

    name: str
    flops: float
    bandwidth: float
    torch_names: tuple[str, ...] = ()


def _card(name: str, tflops: float, gigabytes: float, *torch_names: str) -> Card:
    return Card(name, tflops * 1e12, gigabytes * 1e9, torch_names)


# NVIDIA's data sheets and, for GeForce, its architecture whitepapers (the line "with FP32
# accumulate"): tensor cores in bfloat16 (T4 and V100, which have none: float16), half of what a
# sheet gives "with sparsity". Names are compared whole: a laptop's card, or a part of one (MIG), is
# another one.
CARDS = (
    _card("B200", 2250, 8000, "NVIDIA B200"),
    _card("H200", 989.5, 4800, "NVIDIA H200"),
    _card("H200-NVL", 835.5, 4800, "NVIDIA H200 NVL"),
    _card("H100", 989.5, 3350, "NVIDIA H100 80GB HBM3"),
    _card("H100-NVL", 835.5, 3900, "NVIDIA H100 NVL"),
    _card("H100-PCIE", 756.5, 2000, "NVIDIA H100 PCIe"),
    _card("A100", 312, 2039, "NVIDIA A100-SXM4-80GB"),
    _card("A100-80GB-PCIE", 312, 1935, "NVIDIA A100 80GB PCIe"),
    _card("A100-40GB", 312, 1555, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    _card("A40", 149.7, 696, "NVIDIA A40"),
    _card("A10", 125, 600, "NVIDIA A10"),
    _card("L40S", 362.05, 864, "NVIDIA L40S"),
    _card("L4", 121, 300, "NVIDIA L4"),
    _card("5090", 209.5, 1792, "NVIDIA GeForce RTX 5090"),
    _card("4090", 165.2, 1008, "NVIDIA GeForce RTX 4090"),
    _card("3090", 71, 936, "NVIDIA GeForce RTX 3090"),
    _card("T4", 65, 320, "Tesla T4"),
    _card("V100", 125, 900, "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
)


def find_card(name: str) -> Card | None:
    """The card that torch, or this table, calls so; None where it is not known."""
    for card in CARDS:
        if name in card.torch_names or name.upper() == card.name:
            return card
    return None
