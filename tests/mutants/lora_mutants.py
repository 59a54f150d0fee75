"""Broken variants of ``lora_linears``, and of who hands out its results."""

from __future__ import annotations

from mutant import Mutant

LINEARS = "adapters/test_lora_linears.py::"
VALUES = LINEARS + "test_values_and_gradients_are_those_of_the_formula[q k v-dtype0-True]"
SEVERAL = (
    LINEARS + "test_values_and_gradients_are_those_of_the_formula[several adapters-dtype0-True]"
)
FOUR_BIT = LINEARS + "test_weights_in_four_bits_are_dequantised_once_in_each_pass[precision1-True]"
KEPT = LINEARS + "test_the_input_is_kept_once"
LAYERS = "adapters/test_fused_lora.py::"
HANDED = LAYERS + "test_results_are_handed_out_to_those_that_ask_for_that_very_input"
WRITTEN = LAYERS + "test_an_input_that_has_changed_is_another_one"
NEEDED = LAYERS + "test_what_was_computed_without_a_gradient_is_not_for_those_who_need_one"
OFF = LAYERS + "test_adapters_that_are_switched_off_or_changed_inside"
DTYPES = LAYERS + "test_adapters_in_another_dtype_than_their_layer_are_pefts"

FUNCTION = "adapters/lora_linears.py"
GROUPS = "adapters/fused_lora.py"


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"LoRA: {name}", file, old, new, tests, room="models")


LORA_MUTANTS = (
    mutant(
        "z is of one layer for all",
        FUNCTION,
        "_columns(inner, layers), ups, strict=True)",
        "_columns(inner, layers)[:1] * len(ups), ups, strict=True)",
        VALUES,
    ),
    mutant(
        "no scaling in the gradient of A",
        FUNCTION,
        "return _scaled([d.to(f.A.dtype) for d, f in zip(parts, adapters, strict=True)], layers)",
        "return [d.to(f.A.dtype) for d, f in zip(parts, adapters, strict=True)]",
        VALUES,
    ),
    mutant(
        "no gradient of x through the adapters",
        FUNCTION,
        "d_x = d_inner @ down",
        "d_x = d_inner @ (0 * down)",
        VALUES,
    ),
    mutant(
        "the gradient of x is that of the last layer",
        FUNCTION,
        "d_x.addmm_(g, dense_weight(layer.base, dtype))",
        "d_x.addmm_(g, dense_weight(layer.base, dtype), beta=0)",
        VALUES,
    ),
    mutant(
        "scalings of adapters are swapped",
        FUNCTION,
        "torch._foreach_mul(list(tensors), scalings)",
        "torch._foreach_mul(list(tensors), scalings[::-1])",
        SEVERAL,
    ),
    mutant(
        "a base is called with what is not cast",
        FUNCTION,
        "return out if type(base) is nn.Linear else out.to(dtype)",
        "return out",
        FOUR_BIT,
    ),
    mutant(
        "the input is kept as it came, too",
        FUNCTION,
        "ctx.save_for_backward(given, inner, down, *ups, *weights)",
        "ctx.save_for_backward(given, inner, down, *ups, *weights, given * 1)",
        KEPT,
    ),
    mutant("results are for any input", GROUPS, "or x is not self._x or", "or", HANDED),
    mutant(
        "results do not look at the values",
        GROUPS,
        "return version, dtype, torch.is_grad_enabled()",
        "return dtype, torch.is_grad_enabled()",
        WRITTEN,
    ),
    mutant(
        "results do not look at the mode",
        GROUPS,
        "return version, dtype, torch.is_grad_enabled()",
        "return version, dtype",
        NEEDED,
    ),
    mutant(
        "adapters that are off act",
        GROUPS,
        "if not acts(layer):\n        return None",
        "if False:\n        return None",
        OFF,
    ),
    mutant(
        "several dtypes are cast to one",
        GROUPS,
        "return dtype if dtypes <= {dtype} and",
        "return dtype if",
        DTYPES,
    ),
)
