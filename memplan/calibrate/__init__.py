"""Measuring a machine once: each file one kind of thing, the way the runtime will do it."""
