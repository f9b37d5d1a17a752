"""The one exception for what a user can mend, and how entry points show it; what they hide."""

import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave cannot work.

    Args:
        problem: what is wrong, with the offending name and value.
        fix: what to do about it; empty where the problem says it.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(f"{problem}\n  -> {fix}" if fix else problem)
        self.problem = problem
        self.fix = fix


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; a UserError is printed without a traceback and exits with 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def hide_known_warnings() -> None:
    """megatron-core's on missing GPU libraries and on deprecations, torch's on reading or saving a
    distributed checkpoint in one process: nothing a user could act on.
    """
    for module in ("megatron", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module)
