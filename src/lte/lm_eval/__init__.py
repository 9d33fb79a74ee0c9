"""Standard tasks by lm-evaluation-harness. Importing this registers its model type ``lte``.

``lte evaluate OUT --tasks ...`` and ``python -m lte.lm_eval --model lte --model_args pretrained=OUT --tasks ...`` run
the same class; the latter is the harness' own command line, with that model type known to it.
"""

from importlib.util import find_spec

from lte.errors import LTEError

if find_spec("lm_eval") is None:
    raise LTEError("standard tasks need the package lm-eval; pip install 'learn-to-be-efficient[eval]'")

from lte.lm_eval.model import LTEModel
from lte.lm_eval.tasks import TaskSet, evaluate_tasks

__all__ = ["LTEModel", "TaskSet", "evaluate_tasks"]
