"""``python -m fedrouter``."""

from fedrouter.cli import main

if __name__ == "__main__":
    main()
