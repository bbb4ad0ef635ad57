"""`python -m fasthyper`: the same as the command `fasthyper`."""

from fasthyper.cli import main

if __name__ == "__main__":
    main()
