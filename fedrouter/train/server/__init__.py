"""What the server does with what clients reveal; never imports the clients' side."""
