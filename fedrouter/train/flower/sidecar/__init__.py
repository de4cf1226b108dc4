"""What runs in Flower's environment: bytes in, bytes out. Imports Flower and the standard library alone."""
