"""The command `nemotron-h`: one file per verb, whose imports happen when it is asked."""


def main() -> None:
    """The console script."""
    from nemotron_h.cli.app import main as run

    run()
