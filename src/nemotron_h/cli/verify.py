"""`nemotron-h verify`: is it right here? One arithmetic, the scan and the folder, checked on this machine."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from nemotron_h.cli.process import HELP_KEYS_VALUES, HELP_PRECISION


def verify(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or org/name[@revision] on the Hub.")],
    precision: Annotated[str, typer.Option(help=HELP_PRECISION)] = "auto",
    keys_values: Annotated[str, typer.Option(help=HELP_KEYS_VALUES)] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a checkpoint on this machine: bits that do not depend on cuts, batches or steps; the scan; the folder.

    Each line has its number. Exit code 1 where one does not hold.
    """
    from itertools import chain

    from nemotron_h.checkpoint.check import check_folder
    from nemotron_h.cli.process import settle
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.inference.load import check_keys_values, check_precision, load, usable
    from nemotron_h.model.check import Finding, check, find

    check_precision(precision)
    check_keys_values(keys_values)
    usable(device)
    settle()
    folder = folder_of(path)
    model = load(folder, precision=precision, keys_values=keys_values, device=device).model
    found = find(model)
    model.row_multiple = found.multiple  # as an engine would find it
    made = f"{model.precision} on {model.device}, rows in multiples of {model.row_multiple}"
    if model.keys_values is not None:
        made += ", keys and values in int8"
    if not as_json:
        print(f"{path} in {made}")
    findings = []
    reason = found.failures[-1] if not found.holds else f"rows in multiples of {found.multiple}"
    served = Finding("what an engine asks of layers and products", found.holds, reason)
    for finding in chain([served], check(model), check_folder(folder, model)):
        findings.append(finding)
        if not as_json:
            print(f"{'holds ' if finding.holds else 'FAILS '} {finding.what}: {finding.number}", flush=True)
    holds = all(finding.holds for finding in findings)
    if as_json:
        print(
            json.dumps(
                {"path": path, "in": made, "holds": holds, "findings": [asdict(finding) for finding in findings]}
            )
        )
    raise typer.Exit(0 if holds else 1)
