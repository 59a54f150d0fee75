"""A causal language model as "tokens in, log-probs out": loading, adapters, forward."""

from fusedgrpo.models.quiet import silence

silence()  # before anything here imports bitsandbytes
