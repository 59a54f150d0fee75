"""``linear_logprob``: log-probs from hidden states, without logits."""
