"""Flower as the transport between server and sites, in a separate Python environment."""
