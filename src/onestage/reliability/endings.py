"""How a command ends when something ends it: every cause becomes an error with its own exit code and remedy."""

import contextlib
import errno
from collections.abc import Iterator

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from onestage.errors import CancelledError, ConfigError, OnestageError, ResourceError, TerminatedError
from onestage.files import OUT_OF_SPACE
from onestage.reliability.watchdog import is_connection_lost, wait_to_be_named


@contextlib.contextmanager
def named_endings(batch_size_key: str = "data.batch_size") -> Iterator[None]:
    """Turn what libraries raise into the errors of this project.

    Args:
        batch_size_key: what to lower when memory runs out.
    """
    try:
        yield
    except OnestageError:
        raise
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise ConfigError(str(error)) from error
    except SIGTERMException as error:  # in an evaluation; it is a SystemExit without a code, which would be success
        raise TerminatedError("SIGTERM ended the command.") from error
    except KeyboardInterrupt as error:
        raise CancelledError("interrupted.") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # how Lightning ends on Ctrl-C, with code 1
            raise CancelledError("interrupted.") from error
        raise
    except (RuntimeError, OSError, MemoryError) as error:
        if is_connection_lost(error):
            wait_to_be_named()
        shortage = _shortage(error, batch_size_key)
        if shortage is None:
            raise
        raise shortage from error


def _shortage(error: Exception, batch_size_key: str) -> ResourceError | None:
    """Say of what the machine has too little, if that is the matter."""
    text = str(error).strip().partition("\n")[0][:300]
    if isinstance(error, OSError) and error.errno in (*OUT_OF_SPACE, errno.EACCES, errno.EROFS):
        return ResourceError(
            f"{error.filename or 'a file'} cannot be written: {error.strerror}.\n"
            "Make room there or make it writable, or set --runs_dir to another folder."
        )
    if is_shared_memory_full(text):
        return ResourceError(
            f"the shared memory through which workers hand over images is full ({text}).\n"
            "Start the container with --shm-size=8g, or set data.num_workers: 0."
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return ResourceError(
            f"out of memory: {text}\nLower {batch_size_key}, or let --auto_batch true find what fits; "
            "trainer.accumulate_grad_batches keeps the batch of a step. Checkpoints are untouched."
        )
    return None


def is_shared_memory_full(text: str) -> bool:
    """Whether an error of torch or a loader's worker means that /dev/shm has no room."""
    return any(word in text for word in ("/torch_", "shared memory", "Bus error", "bus error"))
