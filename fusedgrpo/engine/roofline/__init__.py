"""The least that rollouts, scoring and updates of a model can cost on a card."""
