"""Import what brings torchao along, where it is installed, without what that logs on the way.

transformers imports it with its quantizers, so that every command would begin with four lines about GPU extensions that
do not load and enums that torch deprecates.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

if "torchao" not in sys.modules and importlib.util.find_spec("torchao") is not None:
    _loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    _levels = [logger.level for logger in _loggers]
    try:
        for _logger in _loggers:
            _logger.setLevel(logging.ERROR)
        importlib.import_module("transformers.quantizers")
    finally:
        for _logger, _level in zip(_loggers, _levels, strict=True):
            _logger.setLevel(_level)
