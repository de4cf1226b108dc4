"""Code that runs in Flower's environment; it imports only Flower and the standard library."""
