"""The client's side of training; never imports ``fedrouter.train.server``."""
