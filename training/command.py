"""How a command on several ranks ends: who speaks, what is logged, which errors are the user's."""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Callable

import pixelprune.command
from pixelprune.command import USER_ERROR, print_error
from training.errors import RankError, UserError

logger = logging.getLogger(__name__)

SECONDS_TO_SPEAK = 10.0

LOST_PEER = 1
"""Exit code of a rank that ends because another one did."""
_LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say of it; both raise what they raise for everything else."""

_SAID_ALIKE = ("training.data.index_builder", "training.distributed.stopping", "training.model")

_FULL_OR_LOCKED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def run_command(do: Callable[[], int | None]) -> int:
    """As `pixelprune.command.run_command`, said once per machine, whichever launcher started the ranks.

    All ranks meet the same mistakes of a recipe, and the first speaks; one that may be a rank's own (memory, a disk) is
    said by each that meets it. The others then lose a connection, which is one line and no fault of theirs.
    """

    def do_or_wait() -> int | None:
        try:
            return do()
        except RankError:
            raise
        except UserError:
            if _is_first_here():
                raise
            # Launchers end all ranks as the first one leaves, which must not be before the one that speaks has spoken.
            time.sleep(SECONDS_TO_SPEAK)
            return USER_ERROR
        except RuntimeError as error:
            if not any(words in str(error) for words in _LOST_PEER_WORDS):
                raise
            said = str(error).splitlines()[0]
            logger.error("this rank ends because another one did, whose own lines say why (%s)", said)
            time.sleep(SECONDS_TO_SPEAK)  # its code, and not this one, is the run's
            return LOST_PEER
        except OSError as error:
            if error.filename is None and error.errno not in _FULL_OR_LOCKED:
                raise
            raise RankError(f"{error.filename or 'a file'}: {error.strerror}") from error

    return pixelprune.command.run_command(do_or_wait, expected=(UserError,))


def set_up_logging(level: int = logging.INFO, name: str = "%(name)s") -> None:
    """Lines with the time and who says them, on stderr; above the bar while one is shown."""
    logging.basicConfig(
        level=level, format=f"%(asctime)s {name}: %(message)s", datefmt="%H:%M:%S", handlers=[_PresentStderr()]
    )


class _PresentStderr(logging.Handler):
    """Writes to what `sys.stderr` is when a line comes: while a bar is shown, rich's own, which keeps them apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # closed, or a full disk: a line that cannot be written ends no run
            self.handleError(record)


def leave_to_the_first() -> None:
    """For ranks other than the first: what all of them find alike is said once. Warnings stay."""
    for name in _SAID_ALIKE:
        logging.getLogger(name).setLevel(logging.WARNING)


def _is_first_here() -> bool:
    """Whether this process speaks for its machine."""
    import torch.distributed as dist

    return dist.get_node_local_rank(fallback_rank=0) == 0


__all__ = ["USER_ERROR", "leave_to_the_first", "print_error", "run_command", "set_up_logging"]
