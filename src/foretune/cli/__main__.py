"""`python -m foretune.cli` is `foretune`."""

from __future__ import annotations

from foretune.cli import main

if __name__ == "__main__":
    main()
