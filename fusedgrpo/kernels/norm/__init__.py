"""Root mean square normalisation, where no gradient is asked for."""
