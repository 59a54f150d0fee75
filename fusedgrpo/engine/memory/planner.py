"""The memory that a run will need on its GPU, before anything is loaded; and how to make it fit.

Everything follows from the options and the model's configuration. The longest case is planned:
every prompt and every completion at its limit. What the parts are and how they are found is in
``engine/memory/measure.py``; here they are put together phase by phase, and what was left open is
chosen: tokens per micro-batch, completions in flight, activation offload.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.engine.memory import measure as memory
from fusedgrpo.engine.memory.advice import advice
from fusedgrpo.engine.memory.measure import (
    Activations,
    Cache,
    ModelShape,
    SmallModel,
    straight_line,
)
from fusedgrpo.engine.memory.plan import CONTEXT, FRAGMENTATION, MemoryPlan, parse_bytes
from fusedgrpo.engine.memory.workload import Asked, paged
from fusedgrpo.errors import FusedGRPOError, PlanError
from fusedgrpo.models.activation_offload import CHUNK

# Beyond it products of matrices are no faster on any card, and memory is better left alone.
MOST_TOKENS = 16384

# Depths whose difference is one layer's share. The first layer is a case of its own: its input is
# the embedding, which the model holds on to.
DEPTHS = (2, 3)

# Architectures are without number, and so is what they raise on tensors without storage.
UNPLANNED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# In flight between layers while activations are offloaded.
LAYERS_ON_GPU = 2


def plan_memory(
    config: GRPOConfig,
    settings: Any,
    *,
    gpu_bytes: int,
    prompt_tokens: int | None = None,
    activation_offloading: bool | None = None,
    world_size: int = 1,
) -> MemoryPlan:
    """The plan of a run on one GPU of ``gpu_bytes`` (each of ``world_size``).

    settings: the model's transformers configuration. prompt_tokens: of the longest prompt; None for
    ``max_prompt_length``, or what ``max_length`` leaves, or 512. activation_offloading: None to
    choose. A plan that does not fit has ``advice``: the nearest change that does. Raises PlanError
    for a model that cannot be run on tensors without storage.
    """
    return MemoryPlanner(settings, world_size).plan(
        config,
        gpu_bytes=gpu_bytes,
        prompt_tokens=prompt_tokens,
        activation_offloading=activation_offloading,
    )


def card_bytes(config: GRPOConfig) -> int | None:
    """The card to plan for: ``gpu_memory``, else the one that is here; None without either."""
    if config.gpu_memory is not None:
        return parse_bytes(config.gpu_memory)
    if host.pick_device(config.use_cpu).type == "cuda":
        return host.gpu_memory()[1]
    return None


class MemoryPlanner:
    """Plans of one model, which is measured once for all of them. See ``plan_memory``."""

    def __init__(self, settings: Any, world_size: int = 1):
        self.settings = settings
        self.world_size = world_size
        self.gpu_bytes = 0
        self._measured: dict[Any, Any] = {}

    def plan(
        self,
        config: GRPOConfig,
        *,
        gpu_bytes: int,
        prompt_tokens: int | None = None,
        activation_offloading: bool | None = None,
    ) -> MemoryPlan:
        self.gpu_bytes = gpu_bytes
        asked = Asked(config, prompt_tokens, activation_offloading)
        try:
            plan = self.choose(asked)
            if plan.fits:
                return plan
            return dataclasses.replace(plan, advice=tuple(advice(asked, plan, self.choose)))
        except FusedGRPOError:
            raise
        except UNPLANNED as error:
            raise PlanError(
                f"The memory of a {type(self.settings).__name__} cannot be planned "
                f"({type(error).__name__}: {error})."
            ) from error

    def choose(self, asked: Asked) -> MemoryPlan:
        """The plan for what was asked, with all that was left open, and without advice."""
        floor, most = self._token_range(asked)
        offloading = asked.offloading
        if offloading is None:
            offloading = asked.config.gradient_checkpointing and not self._update_fits(
                asked, floor, False
            )
        if asked.config.tokens_per_microbatch is not None:
            tokens = most
        else:
            tokens = self._most_tokens(asked, floor, most, offloading)
        rows = self._most_rows(asked)
        return self._composed(asked, tokens, rows, offloading)

    # --- parts ------------------------------------------------------------------------------

    def _resident(self, asked: Asked) -> dict[str, int]:
        config, weights = asked.config, self._weights(asked)
        trained = sum(weights.trained)
        rows = {
            "weights in 4 bit": weights.four_bit,
            "embeddings and head": weights.embeddings_and_head,
            "other weights": weights.other,
            "LoRA adapter": weights.adapter,
            "optimizer state": 0 if paged(config) else _state(config, weights.trained),
        }
        if config.finetuning_type == "full" and config.beta:
            rows["reference model"] = trained * weights.trained_itemsize
        return {name: size for name, size in rows.items() if size}

    def _weights(self, asked: Asked) -> memory.Weights:
        key = "weights", _model_key(asked.config)
        return self._once(key, lambda: memory.count_weights(asked.config, self.settings))

    def _activations(self, asked: Asked, tokens: int, gradients: bool) -> Activations:
        config = asked.config
        batch = asked.batch(max(min(tokens, self._step_tokens(asked)), 1))

        def at(layers: int) -> Activations:
            model, key = self._small_model(config, layers)
            return self._once(
                (key, batch, gradients), lambda: model.activations(batch, gradients=gradients)
            )

        return straight_line(at, *DEPTHS, self._shape(config).layers)

    def _rollout(self, asked: Asked, rows: int) -> Cache:
        config = asked.config
        groups = max(rows // config.num_generations, 1)

        def at(layers: int) -> Cache:
            model, key = self._small_model(config, layers)
            return self._once(
                (key, rows, asked.prompt, asked.longest),
                lambda: model.rollout(
                    rows=rows, groups=groups, prompt=asked.prompt, length=asked.longest
                ),
            )

        return straight_line(at, *DEPTHS, self._shape(config).layers)

    def _small_model(self, config: GRPOConfig, layers: int) -> tuple[SmallModel, Any]:
        key = _model_key(config), config.gradient_checkpointing, layers
        return self._once(key, lambda: SmallModel(config, self.settings, layers)), key

    def _shape(self, config: GRPOConfig) -> ModelShape:
        return ModelShape.of(config, self.settings)

    def _once(self, key: Any, measure: Any) -> Any:
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]

    # --- composition ------------------------------------------------------------------------

    def _composed(self, asked: Asked, tokens: int, rows: int, offloading: bool) -> MemoryPlan:
        resident = self._resident(asked)
        stays = {"weights, adapter, optimizer": sum(resident.values())}
        weights = self._weights(asked)
        gradients = {"gradients": sum(weights.trained) * weights.trained_itemsize}
        cache = self._rollout(asked, rows)
        scoring = self._activations(asked, tokens, False)
        update, on_host = self._update(asked, tokens, offloading)
        saved = min(self._saved(asked, tokens, offloading), update.forward)
        phases = {
            "weights": stays,
            "rollout": stays
            | (
                {"KV cache": cache.entries, "one token": cache.decoding}
                if cache.entries + cache.decoding >= cache.prefill
                else {"reading the prompts": cache.prefill}
            ),
            "scoring": stays | {"one layer, or the head": scoring.forward},
            "update forward": stays
            | gradients
            | {"saved activations": saved, "one layer, or the head": update.forward - saved},
            "update backward": stays
            | gradients
            | {
                "saved activations": min(saved, update.backward),
                "one layer, or the head": update.backward - min(saved, update.backward),
            },
            # No optimizer allocates anything in its step (engine/optimizer.py).
            "optimizer step": stays | gradients,
        }
        host = {"offloaded activations": on_host}
        if paged(asked.config):
            host["paged optimizer state"] = _state(asked.config, weights.trained)
        return MemoryPlan(
            gpu_bytes=self.gpu_bytes,
            resident=resident,
            phases=phases,
            tokens_per_microbatch=tokens,
            max_in_flight=rows,
            activation_offloading=offloading,
            longest=asked.longest,
            host={name: size for name, size in host.items() if size},
        )

    def _update(self, asked: Asked, tokens: int, offloading: bool) -> tuple[Activations, int]:
        """The memory of an update, and the bytes that are on the host instead."""
        found = self._activations(asked, tokens, True)
        if not offloading:
            return found, 0
        layers, one = self._shape(asked.config).layers, self._layer_input(asked, tokens)
        # Forward the model itself holds its embeddings besides; in the head's backward pass the
        # last input is on its way back.
        here = Activations(
            layers_forward=found.layers_forward - one * (layers - LAYERS_ON_GPU - 1),
            head_forward=found.head_forward - one * (layers - LAYERS_ON_GPU + 1),
            head_backward=found.head_backward - one * (layers - LAYERS_ON_GPU),
            layers_backward=found.layers_backward - one * (layers - LAYERS_ON_GPU),
        )
        return here, self._on_host(asked, tokens, one)

    def _on_host(self, asked: Asked, tokens: int, layer_input: int) -> int:
        """Every layer's input, the last norm's in float32 and what the head saves, in whole pieces
        (models/activation_offload.py)."""
        shape = self._shape(asked.config)
        batch = asked.batch(max(min(tokens, self._step_tokens(asked)), 1))
        saved = [layer_input] * shape.layers
        saved += [4 * batch.tokens * shape.hidden, batch.scored * shape.hidden * shape.itemsize]
        return sum(-(-size // CHUNK) * CHUNK for size in saved)

    def _layer_input(self, asked: Asked, tokens: int) -> int:
        shape = self._shape(asked.config)
        return min(tokens, self._step_tokens(asked)) * shape.hidden * shape.itemsize

    def _saved(self, asked: Asked, tokens: int, offloading: bool) -> int:
        """Bytes that the forward pass leaves for the backward pass."""
        layers = self._shape(asked.config).layers
        if asked.config.gradient_checkpointing:
            return self._layer_input(asked, tokens) * (LAYERS_ON_GPU if offloading else layers)
        return self._activations(asked, tokens, True).head_forward

    # --- choices ----------------------------------------------------------------------------

    def _token_range(self, asked: Asked) -> tuple[int, int]:
        """The least budget, one longest sequence, and the most that is of use."""
        floor = asked.longest
        if asked.config.tokens_per_microbatch is not None:
            return floor, max(asked.config.tokens_per_microbatch, floor)
        return floor, max(min(self._step_tokens(asked), MOST_TOKENS), floor)

    def _step_tokens(self, asked: Asked) -> int:
        config = asked.config
        groups = -(-self._batch_plan(config).groups_per_step // self.world_size)
        per_group = asked.prompt + config.num_generations * config.max_completion_length
        if config.shared_prompt == "off":
            per_group = config.num_generations * asked.longest
        return groups * per_group

    def _batch_plan(self, config: GRPOConfig) -> Any:
        return resolve_batch(config, 1 << 30, self.world_size)

    def _update_fits(self, asked: Asked, tokens: int, offloading: bool) -> bool:
        return self._update_bytes(asked, tokens, offloading) <= self.gpu_bytes

    def _update_bytes(self, asked: Asked, tokens: int, offloading: bool) -> int:
        weights = self._weights(asked)
        own = sum(weights.trained) * weights.trained_itemsize
        update, _ = self._update(asked, tokens, offloading)
        own += max(update.forward, update.backward)
        return sum(self._resident(asked).values()) + _with_reserve(own)

    def _most_tokens(self, asked: Asked, floor: int, most: int, offloading: bool) -> int:
        if self._update_fits(asked, most, offloading):
            return most
        low, high = (self._update_bytes(asked, tokens, offloading) for tokens in (floor, most))
        if low > self.gpu_bytes or most == floor:
            return floor
        while most > floor:
            tokens = floor + (most - floor) * (self.gpu_bytes - low) // (high - low)
            tokens = max(tokens // 256 * 256, floor)
            size = self._update_bytes(asked, tokens, offloading)
            if size <= self.gpu_bytes:
                return tokens
            most, high = tokens, size  # a kink in the line
        return floor

    def _most_rows(self, asked: Asked) -> int:
        config, n = asked.config, asked.config.num_generations
        everything = -(-self._batch_plan(config).groups_per_rollout // self.world_size) * n
        if config.max_in_flight is not None:
            return _waves(min(config.max_in_flight, everything), n)
        low, high = (self._rollout_bytes(asked, rows) for rows in (1, everything))
        rows = everything
        while high > self.gpu_bytes and rows > 1:
            share = max(self.gpu_bytes - low, 0) / (high - low) if high > low else 0.0
            rows = _waves(min(1 + int((rows - 1) * share), rows - 1), n)
            high = self._rollout_bytes(asked, rows)
        return rows

    def _rollout_bytes(self, asked: Asked, rows: int) -> int:
        cache = self._rollout(asked, rows)
        own = max(cache.entries + cache.decoding, cache.prefill)
        return sum(self._resident(asked).values()) + _with_reserve(own)


def _waves(rows: int, n: int) -> int:
    """The sampler takes whole groups of ``n`` where it can."""
    return rows - rows % n or rows


def _with_reserve(own: int) -> int:
    return CONTEXT + int((1 + FRAGMENTATION) * own)


def _state(config: GRPOConfig, trained: tuple[int, ...]) -> int:
    """Two moments of each parameter: float32; with 8 bits a byte, and a float32 for each 256, from
    4,096 elements on (bitsandbytes)."""
    if "8bit" not in config.optim:
        return 8 * sum(trained)
    return sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in trained)


def _model_key(config: GRPOConfig) -> tuple[Any, ...]:
    """The options that a measurement depends on, beside lengths."""
    targets = config.lora_target_modules
    return (
        config.finetuning_type, config.lora_r,
        targets if isinstance(targets, str) else tuple(targets),
        config.load_in_4bit, config.use_bnb_nested_quant, config.dtype, config.bf16, config.fp16,
        config.lora_dropout, config.disable_dropout, config.router_aux_loss_coef,
    )  # fmt: skip
