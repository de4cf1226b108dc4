"""What both sides put on a wire: arrays, numbers and short strings, bounded and versioned."""
