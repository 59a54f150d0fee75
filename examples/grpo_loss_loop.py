"""GRPO by hand: a training loop of forty lines around ``fusedgrpo.GRPOLoss``.

A small random Llama learns to say even tokens. Everything is here: sampling, rewards, group
advantages, the loss without logits, the update. Runs on a CPU in seconds:

    python examples/grpo_loss_loop.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusedgrpo import GRPOLoss
from fusedgrpo.kernels import group_advantages

VOCAB, PROMPT, COMPLETION, GENERATIONS, STEPS = 32, 4, 12, 8, 40


def main() -> list[float]:
    """The mean reward of each step: the share of even tokens, 0.5 by chance."""
    torch.set_num_threads(1)  # a model this small only loses by a second one
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_fn = GRPOLoss(loss_type="dapo", epsilon=0.2)
    history = []
    for step in range(STEPS):
        prompts = torch.randint(VOCAB, (4, PROMPT)).repeat_interleave(GENERATIONS, 0)
        with torch.no_grad():
            ids = sample(model, prompts)
        completions = ids[:, PROMPT:]
        rewards = (completions % 2 == 0).float().mean(1)
        advantages = group_advantages(rewards, group_size=GENERATIONS)

        hidden = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]  # each predicts the next
        mask = torch.ones_like(completions)
        loss, _ = loss_fn(hidden, model.lm_head.weight, completions, mask, advantages)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(rewards.mean().item())
        if step % 10 == 9:
            print(f"step {step + 1:2}  even tokens {history[-1]:.0%}")
    return history


def sample(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(COMPLETION):
        logits = model(ids).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids


if __name__ == "__main__":
    main()
