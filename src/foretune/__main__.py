"""`python -m foretune` is the `foretune` program."""

from foretune.cli import main

if __name__ == "__main__":
    main()
