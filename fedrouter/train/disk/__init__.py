"""Files in a run's directory."""
