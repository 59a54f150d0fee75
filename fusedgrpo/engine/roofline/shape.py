"""The matrix products, keys and values of a causal LM: what its work on a GPU follows from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fusedgrpo.engine.memory.fake_layers import FourBitLinear, four_bit_bytes
from fusedgrpo.models.adapters.attached import adapter_layers
from fusedgrpo.models.head import find_head

# Layers that read the same input: one product with their weights end to end does for all of them.
SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


class UnknownShapeError(ValueError):
    """A model whose work is not known here: it has parts that are no linear layers, or adapters
    that are no plain LoRA."""


class Product(NamedTuple):
    """A linear layer. nbytes: of its weight as it is kept. rank: of the LoRA factors beside it,
    factor_bytes theirs, 0 without. trains: its own weight does. reads: of the linear layers with
    the same input the first one. passes_on: a gradient of its input is wanted. closes: the last one
    of a decoder layer, whose output no gradient needs."""

    inputs: int
    outputs: int
    nbytes: int
    rank: int = 0
    factor_bytes: int = 0
    trains: bool = False
    reads: bool = True
    passes_on: bool = True
    closes: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def factors(self) -> int:
        """Elements of both LoRA factors."""
        return self.rank * (self.inputs + self.outputs)


class Attention(NamedTuple):
    """The attention of a layer. queries: heads x head dimension. entries: elements of a token's
    keys and values. window: how many keys a query sees at most, None for all before it."""

    queries: int
    entries: int
    window: int | None = None


@dataclass(frozen=True)
class Shape:
    """vocabulary, hidden: of the head. head_bytes: of its weight in the dtype that is computed in,
    which has itemsize bytes."""

    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    vocabulary: int
    hidden: int
    head_bytes: int
    itemsize: int
    head_trains: bool = False

    @property
    def layer_bytes(self) -> int:
        """Bytes of weights and factors, which a pass through all layers reads once."""
        return sum(p.nbytes + p.factor_bytes for p in self.products)

    @property
    def entry_bytes(self) -> int:
        """Keys and values of a token, of all layers."""
        return self.itemsize * sum(layer.entries for layer in self.attention)

    @classmethod
    def of(cls, model: Any, itemsize: int) -> Shape:
        """The shape of a causal LM, peft's adapters in it or not; it may be on the meta device.
        itemsize: of the dtype that it computes in. Raises UnknownShapeError, and ModelError for
        its head."""
        head, settings = find_head(model), model.config.get_text_config()
        modules = dict(model.get_decoder().named_modules())
        attention = {name: m for name, m in modules.items() if _is_attention(m)}
        _check_all_known(model, modules)
        if len(attention) != settings.num_hidden_layers:
            raise UnknownShapeError(f"{type(model).__name__}: not all layers have attention.")
        V, H = head.weight.shape
        return cls(
            tuple(_products(modules, list(attention), _ranks(model))),
            tuple(_attention(m, settings) for m in attention.values()),
            V,
            H,
            V * H * itemsize,
            itemsize,
            head.weight.requires_grad,
        )

    def merged(self) -> Shape:
        """With a copy of each adapted weight in the dtype that is computed in, the factors in it:
        what ``rollout_weights: merged`` samples from."""

        def merged(p: Product) -> Product:
            nbytes = p.weights * self.itemsize if p.rank else p.nbytes
            return p._replace(nbytes=nbytes, rank=0, factor_bytes=0)

        return self.beside()._changed(merged)

    def beside(self) -> Shape:
        """With the factors, and weights of more bytes, in the dtype that is computed in: what
        ``rollout_weights: adapter`` samples from."""

        def beside(p: Product) -> Product:
            nbytes = min(p.nbytes, p.weights * self.itemsize)
            return p._replace(nbytes=nbytes, factor_bytes=p.factors * self.itemsize)

        return self._changed(beside)

    def without_adapter(self) -> Shape:
        """The model with its adapters switched off: the reference."""
        return self._changed(lambda p: p._replace(rank=0, factor_bytes=0))

    def _changed(self, change: Callable[[Product], Product]) -> Shape:
        return dataclasses.replace(self, products=tuple(map(change, self.products)))


def _is_attention(module: Any) -> bool:
    read = (getattr(module, name, None) for name in ("k_proj", "qkv_proj"))
    return hasattr(getattr(module, "o_proj", None), "in_features") and any(
        hasattr(layer, "out_features") for layer in read
    )


def _attention(module: Any, settings: Any) -> Attention:
    queries: int = module.o_proj.in_features
    if hasattr(module, "k_proj"):
        values = module.v_proj if getattr(module, "v_proj", None) is not None else module.k_proj
        entries = module.k_proj.out_features + values.out_features
    else:
        entries = module.qkv_proj.out_features - queries
    window = getattr(module, "sliding_window", getattr(settings, "sliding_window", None))
    return Attention(queries, entries, window)


def _products(
    modules: dict[str, nn.Module], attention: Sequence[str], ranks: dict[int, tuple[int, int]]
) -> Iterator[Product]:
    """The linear layers in ``modules``. attention: the name of each decoder layer's own."""
    linears = list(_linears(modules))
    layers = [name.rpartition(".")[0] + "." for name in attention]
    last = {layer: name for name, *_ in linears for layer in layers if name.startswith(layer)}
    seen: set[tuple[str, int]] = set()
    for name, linear, adapter in linears:
        parent, _, own = name.rpartition(".")
        kind = next((i for i, names in enumerate(SAME_INPUT) if own in names), -1)
        rank, factor_bytes = ranks.get(id(adapter), (0, 0))
        trains = linear.weight.requires_grad
        # Of frozen embeddings nobody wants a gradient.
        of_embeddings = parent == attention[0] and own in (*SAME_INPUT[0], "qkv_proj")
        yield Product(
            linear.in_features,
            linear.out_features,
            _nbytes(linear),
            rank,
            factor_bytes,
            trains=trains,
            reads=kind < 0 or (parent, kind) not in seen,
            passes_on=trains or not of_embeddings,
            closes=name in last.values(),
        )
        seen.add((parent, kind))


def _ranks(model: Any) -> dict[int, tuple[int, int]]:
    """By peft's layers: the rank of all that acts, and the bytes of its factors. Raises
    UnknownShapeError."""
    found = {}
    for layer in adapter_layers(model):
        names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
        plain = isinstance(getattr(layer, "base_layer", None), nn.Linear)
        if not names or not plain or any(name in layer.lora_variant for name in names):
            raise UnknownShapeError(f"{type(layer).__name__} is no plain LoRA on a linear layer.")
        factors = [f[name].weight for name in names for f in (layer.lora_A, layer.lora_B)]
        rank = sum(layer.lora_A[name].weight.shape[0] for name in names)
        found[id(layer)] = rank, sum(factor.nbytes for factor in factors)
    return found


def _linears(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Any, Any]]:
    """Name, linear layer and peft's layer around it, if there is one (else the layer again)."""
    for name, module in modules.items():
        inner = name.partition(".base_layer")[0]
        if inner != name or ".lora_" in name:
            continue
        linear = getattr(module, "base_layer", module)
        if isinstance(linear, nn.Linear):
            yield name, linear, module


def _check_all_known(model: Any, modules: dict[str, nn.Module]) -> None:
    """Every matrix is a linear layer's or the embedding's. Raises UnknownShapeError."""
    for name, module in modules.items():
        if ".experts." in name:
            raise UnknownShapeError(f"{type(model).__name__} has experts, a part of which works.")
        if isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise UnknownShapeError(
                    f"{type(model).__name__}: {name}.{own} is of no linear layer."
                )


def _nbytes(linear: Any) -> int:
    """Bytes of the weight as it is kept; biases are left out."""
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        return four_bit_bytes(linear.in_features * linear.out_features, state.nested)
    if isinstance(linear, FourBitLinear):
        return four_bit_bytes(linear.in_features * linear.out_features, nested=True)
    return int(linear.weight.nbytes)
