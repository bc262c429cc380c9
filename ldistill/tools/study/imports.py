"""What the programs of a study import, for :mod:`ldistill.tools.study.warm` to have it ready."""

import functools

import lmms_eval.__main__
import lmms_eval.tasks
import lmms_eval.utils
import transformers.integrations.deepspeed  # noqa: F401

import ldistill.evaluation.lmms_model
import ldistill.tiny.suite
import ldistill.tools.merge
import ldistill.training.run  # noqa: F401

# lmms-eval reads its thousand task files anew whenever it starts, which takes longer than scoring a
# small student on a few of them.
lmms_eval.utils.load_yaml_config = functools.cache(lmms_eval.utils.load_yaml_config)
lmms_eval.tasks.TaskManager()
