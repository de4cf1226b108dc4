"""Flower as the engine that moves bytes: in an environment of its own, beside this one."""
