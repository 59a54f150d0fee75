"""``lora_linears`` against its formula: values, gradients, what is kept, and how it rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fusedgrpo.models.adapters.lora_linears import Factors, LoraLinear, lora_linears

WIDTH = 24
# Outputs and ranks of each layer's adapters. Scalings are no powers of two: they have to round.
KINDS: dict[str, list[tuple[int, list[int]]]] = {
    "one": [(16, [3])],
    "q k v": [(24, [3]), (8, [3]), (8, [3])],
    "several adapters": [(16, [2, 4]), (40, [3]), (8, [1, 2, 3])],
}
TIGHT = {torch.float64: 1e-13, torch.float32: 2e-6}


def layers_of(kind: str, dtype: torch.dtype, bias: bool = True) -> list[LoraLinear]:
    made = []
    for out, ranks in KINDS[kind]:
        base = nn.Linear(WIDTH, out, bias=bias, dtype=dtype).requires_grad_(False)
        adapters = [
            Factors(
                torch.randn(r, WIDTH, dtype=dtype).requires_grad_(),
                torch.randn(out, r, dtype=dtype).requires_grad_(),
                0.3 + 0.7 * r,
            )
            for r in ranks
        ]
        made.append(LoraLinear(base, adapters))
    return made


def by_formula(x: Tensor, layers: Sequence[LoraLinear], *_: Any) -> tuple[Tensor, ...]:
    """As peft has it."""
    return tuple(
        sum(
            (nn.functional.linear(nn.functional.linear(x, A), B) * s for A, B, s in layer.adapters),
            layer.base(x),
        )
        for layer in layers
    )


def trained(x: Tensor, layers: Sequence[LoraLinear]) -> list[Tensor]:
    factors = [t for layer in layers for A, B, _ in layer.adapters for t in (A, B)]
    return [t for t in (x, *factors) if t.requires_grad]


def run(how: Any, x: Tensor, layers: Sequence[LoraLinear], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of all that trains."""
    outputs = how(x, layers, dtype)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(
        torch.autograd.grad(outputs, trained(x, layers), grads)
    )


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formula(
    kind: str, dtype: torch.dtype, bias: bool
) -> None:
    layers = layers_of(kind, dtype, bias)
    x = torch.randn(1, 11, WIDTH, dtype=dtype, requires_grad=True)
    expected = run(by_formula, x, layers, dtype)
    found = run(lora_linears, x, layers, dtype)
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert off_by(a, b) < TIGHT[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    layers = layers_of(kind, torch.float64)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        given = iter(factors)
        own = [
            LoraLinear(base, [Factors(next(given), next(given), s) for _, _, s in adapters])
            for base, adapters in layers
        ]
        return lora_linears(x, own, torch.float64)

    assert torch.autograd.gradcheck(of, trained(x, layers))


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 1, 3), (1, 0)])
def test_rows_in_any_shape(shape: tuple[int, ...]) -> None:
    layers = layers_of("q k v", torch.float64)
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    for a, b in zip(
        *(run(how, x, layers, x.dtype) for how in (lora_linears, by_formula)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_rows_and_gradients_that_do_not_lie_end_to_end() -> None:
    layers = layers_of("q k v", torch.float64)
    x = torch.randn(WIDTH, 7, 2, dtype=torch.float64, requires_grad=True).transpose(0, 2)
    found, expected = (
        torch.autograd.grad(sum((y.transpose(0, 1) ** 2).sum() for y in how(x, layers, x.dtype)), x)
        for how in (lora_linears, by_formula)
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "A", "B", "an adapter", "a layer"])
def test_what_does_not_train_gets_no_gradient(frozen: str) -> None:
    layers = layers_of("several adapters", torch.float64)
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64, requires_grad=frozen != "x")
    (first, second), *_ = (layer.adapters for layer in layers)
    still: dict[str, list[Tensor]] = {
        "x": [],
        "A": [f.A for layer in layers for f in layer.adapters],
        "B": [f.B for layer in layers for f in layer.adapters],
        "an adapter": [second.A, second.B],
        "a layer": [first.A, first.B, second.A, second.B],
    }
    for tensor in still[frozen]:
        tensor.requires_grad_(False)
    for a, b in zip(
        *(run(how, x, layers, x.dtype) for how in (lora_linears, by_formula)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_result_that_nobody_uses() -> None:
    layers = layers_of("q k v", torch.float64)
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    q, _, v = lora_linears(x, layers, x.dtype)
    want_q, _, want_v = by_formula(x, layers)
    used = [x, *layers[0].adapters[0][:2], *layers[2].adapters[0][:2]]
    found = torch.autograd.grad((q**2).sum() + v.sum(), used)
    expected = torch.autograd.grad((want_q**2).sum() + want_v.sum(), used)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def kept_by(how: Any, x: Tensor, layers: Sequence[LoraLinear], dtype: torch.dtype) -> int:
    """How many tensors as large as x are kept for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = how(x, layers, dtype)  # which hold what is kept
    assert outputs
    return sum(size == x.numel() for size in kept.values())


def test_the_input_is_kept_once() -> None:
    layers = layers_of("q k v", torch.float32)
    x = torch.randn(1, 61, WIDTH, requires_grad=True) * 1  # autocast keeps its casts of leaves
    assert kept_by(lora_linears, x, layers, torch.float32) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_by(lora_linears, x, layers, torch.bfloat16) == 1
        assert kept_by(by_formula, x, layers, torch.bfloat16) > 1


def in_float64(layer: LoraLinear) -> LoraLinear:
    base = nn.Linear(WIDTH, layer.base.out_features, dtype=torch.float64).requires_grad_(False)
    base.load_state_dict(layer.base.state_dict())
    wide = ((A.detach().double(), B.detach().double(), s) for A, B, s in layer.adapters)
    return LoraLinear(
        base, [Factors(A.requires_grad_(), B.requires_grad_(), s) for A, B, s in wide]
    )


def squared_errors(kind: str, given: torch.dtype, dtype: torch.dtype) -> Tensor:
    """``[outputs and gradients, 2]`` under autocast: of ours and of the formula, from float64."""
    layers = layers_of(kind, torch.float32)
    x = torch.randn(1, 200, WIDTH).to(given).requires_grad_()
    wide = [in_float64(layer) for layer in layers]
    truth = run(by_formula, x.detach().double().requires_grad_(), wide, torch.float64)
    with torch.autocast("cpu", dtype):
        found, plain = (run(how, x, layers, dtype) for how in (lora_linears, by_formula))
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    rows = zip(found, plain, truth, strict=True)
    return torch.tensor([[off_by(a, true) ** 2, off_by(b, true) ** 2] for a, b, true in rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["float32", "sixteen bits"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_is_no_further_from_the_truth_than_the_formula(
    kind: str, given: str, dtype: torch.dtype
) -> None:
    x_dtype = torch.float32 if given == "float32" else dtype
    # Several times: the gradient of a factor has few elements, and so has its error.
    total = sum(squared_errors(kind, x_dtype, dtype) for _ in range(8)) / 8
    ours, formula = torch.as_tensor(total).sqrt().unbind(1)
    assert (ours <= 1.15 * formula).all() and (ours / formula).mean() < 1, ours / formula
    assert (formula < 0.02).all()


def test_a_weight_that_changes_before_the_backward_pass_is_an_error() -> None:
    layers = layers_of("one", torch.float32)
    x = torch.randn(1, 5, WIDTH, requires_grad=True)
    (y,) = lora_linears(x, layers, torch.float32)
    layers[0].base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_factors_that_change_before_the_backward_pass_do_not_matter() -> None:
    """As under autocast, which keeps its casts of them."""
    layers = layers_of("one", torch.float64)
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(by_formula(x, layers)[0].sum(), x)
    (y,) = lora_linears(x, layers, x.dtype)
    with torch.no_grad():
        layers[0].adapters[0].A.mul_(2)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


def four_bit(layer: nn.Linear, nested: bool, dtype: torch.dtype) -> Any:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    made.weight = bnb.nn.Params4bit(
        layer.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    made.bias = layer.bias
    return made.to("cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_weights_in_four_bits_are_dequantised_once_in_each_pass(
    precision: torch.dtype, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    layers = [
        LoraLinear(four_bit(layer.base, nested, precision), layer.adapters)
        for layer in layers_of("q k v", torch.float32)
    ]
    made: list[Any] = []
    original = bitsandbytes.functional.dequantize_4bit

    def noting(*args: Any, **options: Any) -> Tensor:
        made.append(original(*args, **options))
        return made[-1]

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", noting)
    low = precision != torch.float32
    x = torch.randn(1, 100, WIDTH, requires_grad=True)
    context = torch.autocast("cpu", precision) if low else contextlib.nullcontext()
    with context:
        found = run(lora_linears, x, layers, precision)
        assert len(made) == len(layers), "in the backward pass: the other one is the layer's own"
        expected = run(by_formula, x, layers, precision)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and off_by(a, b) < (0.02 if low else 2e-6)
