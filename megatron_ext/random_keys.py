"""Seeds keyed by what they are for: a draw depends neither on the grid nor on earlier draws."""


def mixed_seed(*key: int) -> int:
    """One seed below 2**63 for a few numbers, which are told apart by their order."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**63
    return seed
