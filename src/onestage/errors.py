"""What a user can get wrong, each with the exit code of its kind.

Every message names the place, the value, the rule and a remedy that exists. `onestage` prints the message alone;
`--debug` adds the traceback.
"""


class OnestageError(Exception):
    """Bad input of any kind. Raise one of the subclasses."""

    exit_code = 1


class ConfigError(OnestageError):
    """A key or value of the configuration or the command line cannot be used."""

    exit_code = 2


class DataError(OnestageError):
    """A file of a data set (annotations, split list, image) is missing, unreadable or breaks a rule."""

    exit_code = 3


class AnnotationError(DataError):
    """An annotation file cannot be read as what it should be."""


class ImageError(DataError):
    """An image file cannot be decoded whole."""


class CheckpointError(OnestageError):
    """A checkpoint is missing, torn, foreign, or belongs to another model."""

    exit_code = 2  # a file named on the command line that cannot be used


class RunInUseError(OnestageError):
    """Another process is writing the run folder."""

    exit_code = 4


class ResourceError(OnestageError):
    """The machine ran out of something: disk space, permission to write, memory, shared memory."""

    exit_code = 5


class NonFiniteError(OnestageError):
    """Training met a loss, gradient or weight that is NaN or infinite, and went on meeting it."""

    exit_code = 6


class ProcessLostError(OnestageError):
    """Another process of the run died or stopped answering."""

    exit_code = 7


class CancelledError(OnestageError):
    """Ctrl-C ended the run, in order; the shell's code for SIGINT."""

    exit_code = 130


class TerminatedError(OnestageError):
    """SIGTERM ended the run, in order; the shell's code for SIGTERM, by which schedulers know a preempted job."""

    exit_code = 143
