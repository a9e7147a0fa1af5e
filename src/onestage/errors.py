"""Error kinds, their exit codes, and `require`, the one check of argument values.

Every message names the place, the problem, the expected and actual value, and a remedy that exists. The command line
prints the message alone; `--debug` adds the traceback.
"""


class OnestageError(Exception):
    """Bad input of any kind. Raise one of the subclasses."""

    exit_code = 1


class ConfigError(OnestageError):
    """A key or value of the configuration or the command line cannot be used."""

    exit_code = 2


class DataError(OnestageError):
    """A file of a data set (annotations, split list, image) is missing, unreadable or invalid."""

    exit_code = 3


class AnnotationError(DataError):
    """An annotation file is malformed or violates a rule of its format."""


class ImageError(DataError):
    """An image file cannot be decoded completely."""


class CheckpointError(OnestageError):
    """A checkpoint is missing, damaged, foreign, or belongs to another model."""

    exit_code = 2  # a file named on the command line that cannot be used


class RunInUseError(OnestageError):
    """Another process is writing to the run folder."""

    exit_code = 4


class ResourceError(OnestageError):
    """The machine ran out of disk space, memory or shared memory, or denied permission."""

    exit_code = 5


class NonFiniteError(OnestageError):
    """Training produced non-finite losses, gradients or weights too many times in a row."""

    exit_code = 6


class ProcessLostError(OnestageError):
    """Another process of the run died or stopped responding."""

    exit_code = 7


class CancelledError(OnestageError):
    """Ctrl-C stopped the run cleanly; the exit code is the shell's for SIGINT."""

    exit_code = 130


class TerminatedError(OnestageError):
    """SIGTERM stopped the run cleanly; the exit code is the shell's for SIGTERM, which schedulers recognise."""

    exit_code = 143


def require(condition: bool, name: str, value: object, rule: str, remedy: str = "") -> None:
    """Check an argument: `require(0 <= alpha <= 1, "SigmoidFocalLoss: alpha", alpha, "in [0, 1]")`.

    Write the condition so that NaN fails it: `not x < 0` would accept NaN, `x >= 0` does not. `name` is the key as the
    user writes it, after its class or group if that is needed to find it; `remedy` names a value or command that works.

    Raises:
        ConfigError: `<name> must be <rule>, got <value>.`, then the remedy on a line of its own.
    """
    if not condition:
        message = f"{name} must be {rule}, got {value!r}."
        raise ConfigError(f"{message}\n{remedy}" if remedy else message)


def missing_package(user: str, requirement: str) -> ConfigError:
    """Return the error of a feature without its package. requirement: what pip installs, such as onestage[wandb]."""
    return ConfigError(f'{user} needs a package that is not installed.\nInstall it: pip install "{requirement}"')
