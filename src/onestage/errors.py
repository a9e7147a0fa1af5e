"""Error kinds, their exit codes, and `require`, the one check of argument values.

Every message names the place, the problem, the expected and actual value, and a remedy that exists. The command line
prints the message alone; `--debug` adds the traceback.
"""


class OnestageError(Exception):
    """Bad input of any kind. Raise one of the subclasses; each says the exit code of the command."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        """Set the exit code; without one it is that of the parent."""
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class ConfigError(OnestageError, exit_code=2):
    """A key or value of the configuration or the command line cannot be used."""


class DataError(OnestageError, exit_code=3):
    """A file of a data set (annotations, split list, image) is missing, unreadable or invalid."""


class AnnotationError(DataError):
    """An annotation file is malformed or violates a rule of its format."""


class ImageError(DataError):
    """An image file cannot be decoded completely."""


class CheckpointError(OnestageError, exit_code=2):  # a file named on the command line that cannot be used
    """A checkpoint is missing, damaged, foreign, or belongs to another model."""


class RunInUseError(OnestageError, exit_code=4):
    """Another process is writing to the run folder."""


class ResourceError(OnestageError, exit_code=5):
    """The machine ran out of disk space, memory or shared memory, or denied permission."""


class NonFiniteError(OnestageError, exit_code=6):
    """Training produced non-finite losses, gradients or weights too many times in a row."""


class ProcessLostError(OnestageError, exit_code=7):
    """Another process of the run died or stopped responding."""


class CancelledError(OnestageError, exit_code=130):
    """Ctrl-C stopped the run cleanly; the exit code is the shell's for SIGINT."""


class TerminatedError(OnestageError, exit_code=143):
    """SIGTERM stopped the run cleanly; the exit code is the shell's for SIGTERM, which schedulers recognise."""


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
