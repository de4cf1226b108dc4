"""What a client does with its rows; never imports the server's side."""
