"""Tools and environments that a policy acts on, between the turns of a completion."""
