"""`python -m ecliptic` is the command `ecliptic`."""

from ecliptic.apps.cli import main

if __name__ == "__main__":
    main()
