"""The memory that a run will need on its GPU, before anything is loaded; and how to make it fit.

Everything follows from the options and the model's configuration. The longest case is planned:
every prompt and every completion at its limit. How large the parts are is in ``sizes.py``, and how
they are measured in ``measure.py``; here they are put together phase by phase, and what was left
open is chosen: tokens per micro-batch, completions in flight, activation offload.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fusedgrpo import host, stages
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import decoded_together
from fusedgrpo.engine.memory.advice import advice
from fusedgrpo.engine.memory.plan import CONTEXT, FRAGMENTATION, MemoryPlan, parse_bytes
from fusedgrpo.engine.memory.rollout_weights import pays
from fusedgrpo.engine.memory.sizes import SamplerMemory, Sizes, optimizer_state
from fusedgrpo.engine.memory.workload import Asked, paged
from fusedgrpo.errors import FusedGRPOError, PlanError

# Beyond it products of matrices are no faster on any card, and memory is better left alone.
MOST_TOKENS = 16384

# Architectures are without number, and so is what they raise on tensors without storage.
UNPLANNED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def plan_memory(
    config: GRPOConfig,
    settings: Any,
    *,
    gpu_bytes: int,
    prompt_tokens: int | None = None,
    activation_offloading: bool | None = None,
    world_size: int = 1,
    sampler_memory: SamplerMemory | None = None,
    decoder: bool = True,
    reward_models: int = 0,
) -> MemoryPlan:
    """The plan of a run on one GPU of ``gpu_bytes`` (each of ``world_size``).

    settings: the model's transformers configuration. prompt_tokens: of the longest prompt; None for
    ``max_prompt_length``, or what ``max_length`` leaves, or 512. activation_offloading: None to
    choose. sampler_memory, decoder, reward_models: see ``Sizes``. A plan that does not fit has
    ``advice``: the nearest change that does. Raises PlanError for a model that cannot be run on
    tensors without storage.
    """
    with stages.stage("planning memory"):
        return MemoryPlanner(settings, world_size, sampler_memory, decoder, reward_models).plan(
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

    def __init__(
        self,
        settings: Any,
        world_size: int = 1,
        sampler_memory: SamplerMemory | None = None,
        decoder: bool = True,
        reward_models: int = 0,
    ):
        self.sizes = Sizes(settings, world_size, sampler_memory, decoder, reward_models)
        self.gpu_bytes = 0

    def plan(
        self,
        config: GRPOConfig,
        *,
        gpu_bytes: int,
        prompt_tokens: int | None = None,
        activation_offloading: bool | None = None,
        advise: bool = True,
    ) -> MemoryPlan:
        """As ``plan_memory``. advise: look for the nearest change that fits, which takes long."""
        self.gpu_bytes = gpu_bytes
        asked = Asked(config, prompt_tokens, activation_offloading)
        try:
            plan = self.choose(asked)
            if plan.fits or not advise:
                return plan
            return dataclasses.replace(plan, advice=tuple(advice(asked, plan, self.choose)))
        except FusedGRPOError:
            raise
        except UNPLANNED as error:
            raise PlanError(
                f"The memory of a {type(self.sizes.settings).__name__} cannot be planned "
                f"({type(error).__name__}: {error})."
            ) from error

    def choose(self, asked: Asked) -> MemoryPlan:
        """The plan for what was asked, with all that was left open, and without advice."""
        weights = asked.config.rollout_weights
        can_merge = weights != "adapter" and self.sizes.merges(asked)
        if can_merge and weights == "merged":
            return self._chosen(dataclasses.replace(asked, merged=True))
        plan = self._chosen(asked)
        if (
            can_merge and pays(asked.config) and plan.fits
        ):  # a copy beside it, if nothing else has to give way
            merged = self._composed(
                dataclasses.replace(asked, merged=True),
                plan.tokens_per_microbatch,
                plan.max_in_flight,
                plan.activation_offloading,
            )
            return merged if merged.fits else plan
        return plan

    def _chosen(self, asked: Asked) -> MemoryPlan:
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
        rows = self._most_rows(asked, tokens)
        return self._composed(asked, tokens, rows, offloading)

    def _composed(self, asked: Asked, tokens: int, rows: int, offloading: bool) -> MemoryPlan:
        resident = self.sizes.resident(asked)
        stays = {"weights, adapter, optimizer": sum(resident.values())}
        weights = self.sizes.weights(asked)
        gradients = {"gradients": sum(weights.trained) * weights.trained_itemsize}
        cache = self.sizes.rollout(asked, rows, tokens)
        scoring = self.sizes.activations(asked, tokens, False)
        update, on_host = self.sizes.update(asked, tokens, offloading)
        saved = min(self.sizes.saved(asked, tokens, offloading), update.forward)
        phases = {
            "weights": stays,
            "rollout": stays | cache.parts,
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
            host["paged optimizer state"] = optimizer_state(asked.config, weights.trained)
        return MemoryPlan(
            gpu_bytes=self.gpu_bytes,
            resident=resident,
            phases=phases,
            tokens_per_microbatch=tokens,
            max_in_flight=rows,
            activation_offloading=offloading,
            longest=asked.longest,
            host={name: size for name, size in host.items() if size},
            rollout_weights="merged" if asked.merged else "adapter",
            recorded=cache.recorded,
        )

    def _token_range(self, asked: Asked) -> tuple[int, int]:
        """The least budget, one longest sequence, and the most that is of use."""
        floor = asked.longest
        if asked.config.tokens_per_microbatch is not None:
            return floor, max(asked.config.tokens_per_microbatch, floor)
        return floor, max(min(self.sizes.step_tokens(asked), MOST_TOKENS), floor)

    def _update_fits(self, asked: Asked, tokens: int, offloading: bool) -> bool:
        return self._update_bytes(asked, tokens, offloading) <= self.gpu_bytes

    def _update_bytes(self, asked: Asked, tokens: int, offloading: bool) -> int:
        weights = self.sizes.weights(asked)
        own = sum(weights.trained) * weights.trained_itemsize
        update, _ = self.sizes.update(asked, tokens, offloading)
        own += max(update.forward, update.backward)
        return sum(self.sizes.resident(asked).values()) + _with_reserve(own)

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

    def _most_rows(self, asked: Asked, tokens: int) -> int:
        config = asked.config
        # generate decodes whole groups; our decoder lets completions in as places fall free.
        n = 1 if self.sizes.decodes(asked) else config.num_generations
        everything = self.sizes.rollout_groups(config) * config.num_generations
        if config.max_in_flight is not None:
            return decoded_together(min(config.max_in_flight, everything), n)
        low, high = (self._rollout_bytes(asked, rows, tokens) for rows in (1, everything))
        rows = everything
        while high > self.gpu_bytes and rows > 1:
            share = max(self.gpu_bytes - low, 0) / (high - low) if high > low else 0.0
            rows = decoded_together(min(1 + int((rows - 1) * share), rows - 1), n)
            high = self._rollout_bytes(asked, rows, tokens)
        return rows

    def _rollout_bytes(self, asked: Asked, rows: int, tokens: int) -> int:
        found = self.sizes.rollout(asked, rows, tokens)
        resident = sum(self.sizes.resident(asked).values())
        return resident + _with_reserve(sum(found.parts.values())) + found.recorded


def _with_reserve(own: int) -> int:
    return CONTEXT + int((1 + FRAGMENTATION) * own)
