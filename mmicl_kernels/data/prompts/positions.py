"""Which tokens of a demonstration are asked for: those that are fused, in AIM."""

POSITIONS = ("text", "answer", "answer_end")


def check_positions(positions: object) -> None:
    """Raise ValueError unless it is one of ``POSITIONS``."""
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}, expected one of {POSITIONS}")
