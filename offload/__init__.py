"""Carrying a plan out: a runtime that streams parameters, gradients and optimizer state between memory tiers."""
