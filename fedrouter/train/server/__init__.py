"""The server's side of training; never imports ``fedrouter.train.client``."""
