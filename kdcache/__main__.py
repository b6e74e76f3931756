"""`python -m kdcache` is the command `kdcache`."""

from kdcache.cli import main

if __name__ == "__main__":
    main()
