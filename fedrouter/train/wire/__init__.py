"""Messages between server and clients: arrays, numbers and short strings, bounded and versioned."""
