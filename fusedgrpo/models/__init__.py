"""A causal language model as "tokens in, log-probs out": loading, adapters, forward."""
