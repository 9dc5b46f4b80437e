"""This machine as a device: what bounds a model here, measured now."""

from nemotron_h import machine
from nemotron_h.config.devices import Device
from nemotron_h.ops.jit.quads import ADDS_QUADS


def this_machine() -> Device:
    """Its rates of the moment, and the memory that is free."""
    return Device(
        name="cpu",
        peaks=peaks(),
        bandwidth_bytes_per_second=machine.bandwidth(),
        memory_bytes=machine.memory().available_bytes,
    )


def peaks() -> dict[str, float]:
    """Operations per second of products, by the weights' precision.

    bfloat16's are float32's where that is faster: they may be widened. Of 8-bit integers four times float32's where one
    instruction takes four at a time (VNNI), else twice; int4 is multiplied as int8.
    """
    rates = machine.matmul_rates(size=1024, rows=512)
    integers = rates["float32"] * (4 if ADDS_QUADS else 2)
    wide = max(rates["bfloat16"], rates["float32"])
    return {"float32": rates["float32"], "bfloat16": wide, "int8": integers, "int4": integers}
