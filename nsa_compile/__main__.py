"""`python -m nsa_compile`: the command nsa-compile."""

from nsa_compile.cli import main

if __name__ == "__main__":
    main()
