from rich.console import Console

from nemotron_h.cli.summary import printable, show_baselines


def test_what_would_steer_a_terminal_is_shown() -> None:
    assert printable("a\x1b[31mb\r\x07c\n\tdé🙂\u202e") == "a\ufffd[31mb\ufffd\ufffdc\n\tdé🙂\ufffd"


def test_the_model_beside_the_best_ngram() -> None:
    console = Console(record=True, width=100)
    bits = {"byte 1-gram": 5.0, "byte 2-gram": 4.0, "xz": 3.0}
    records = {"baselines": {"bits_per_byte": bits, "best_ngram": 4.0}, "train": {"bits_per_byte": 3.0}}
    show_baselines(records, console)
    records["train"]["bits_per_byte"] = 5.0
    show_baselines(records, console)
    text = console.export_text()
    assert "this model takes 25.0 % fewer bits than the best n-gram" in text
    assert "this model takes 25.0 % more bits than the best n-gram" in text
    assert "it has not learnt to predict" in text
