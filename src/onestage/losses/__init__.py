"""Classification and box losses; each name is imported on first use, the stub beside this file lists them.

Constructors raise ConfigError for an argument outside the range in their docstring.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
