"""The program: `kdcache` and `python -m kdcache`."""

from kdcache.process.early import at_once

at_once()  # before the imports that take time

from kdcache.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
