"""`python -m nemotron_h`: the command, of that Python."""

from nemotron_h.cli.app import main

if __name__ == "__main__":
    main()
