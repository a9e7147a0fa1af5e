"""The checks of what a user may set on a data module: ranges, class tables, and that splits agree on their classes."""

from onestage.errors import ConfigError


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Check a whole number.

    Raises:
        ConfigError: `data.<name>` is smaller than `minimum`.
    """
    if value < minimum:
        raise ConfigError(
            f"data.{name} is {value}; it must be at least {minimum}.\nSet data.{name}: {minimum} or more."
        )


def require_positive(name: str, value: float, remedy: str) -> None:
    """Check a length of time.

    Raises:
        ConfigError: `data.<name>` is not more than 0.
    """
    if not value > 0:  # also where it is not a number
        raise ConfigError(f"data.{name} is {value:g}; it must be more than 0.\n{remedy}")


def require_fraction(name: str, value: float, remedy: str) -> None:
    """Check a share or a probability.

    Raises:
        ConfigError: `data.<name>` is not in 0..1.
    """
    if not 0 <= value <= 1:  # also where it is not a number
        raise ConfigError(f"data.{name} is {value:g}; it must be in 0..1.\n{remedy}")


def require_classes(class_names: list[str] | None, category_ids: list[int] | None) -> None:
    """Check the classes that were given by hand or by a checkpoint.

    Raises:
        ConfigError: names or ids are empty, repeated, or do not go together.
    """
    if class_names is not None and (not class_names or len(set(class_names)) < len(class_names)):
        raise ConfigError(
            f"data.class_names is {class_names}; it must hold at least one name, and none twice.\n"
            "Leave it out to take the classes of the training annotations."
        )
    if category_ids is None:
        return
    if class_names is None or len(set(category_ids)) != len(class_names) or len(category_ids) != len(class_names):
        raise ConfigError(
            f"data.category_ids is {category_ids}; it must give each of data.class_names ({class_names}) its own id.\n"
            "Leave both out to take those of the training annotations."
        )


def require_split(val_fraction: float | None, num_folds: int | None, fold: int) -> None:
    """Check the settings that divide one annotated set into training and validation.

    Raises:
        ConfigError: both ways are asked for, or a number is out of its range.
    """
    if val_fraction is not None and num_folds is not None:
        raise ConfigError(
            f"data.val_fraction is {val_fraction:g} and data.num_folds is {num_folds}; a set is divided one way.\n"
            "Leave one of them out."
        )
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ConfigError(
            f"data.val_fraction is {val_fraction:g}; it must lie between 0 and 1.\nSet data.val_fraction: 0.2."
        )
    if num_folds is not None:
        require_at_least("num_folds", num_folds, 2)
    last = (num_folds or 1) - 1
    if not 0 <= fold <= last:
        raise ConfigError(
            f"data.fold is {fold}; with data.num_folds: {num_folds or 'null'} it must be in 0..{last}.\n"
            "Set data.num_folds to the number of parts, and data.fold to the one to validate on."
        )
