"""Makes `python -m foretune.cli` the same as `foretune`."""

from __future__ import annotations

from foretune.cli import main

if __name__ == "__main__":
    main()
