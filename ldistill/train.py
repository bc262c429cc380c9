"""Train a student: what `deepspeed` starts.

    deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json
    deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe lingudistill \
        --shards shards/ --output_dir runs/lingudistill

recipe → shards → pair → distiller → trainer → export → evaluation. Without a recipe it runs the
embedded default, `tiny`, offline and on whatever machine this is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Started as a script, Python puts this folder first on its path, where our modules would shadow
# installed ones.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if entry != _HERE]


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    0 done, 2 an error to put right, 75 a failure that may pass by itself, 85 stopped on request.
    """
    from ldistill.common.environment import check_versions, settle_environment

    argv = sys.argv[1:] if argv is None else argv
    settle_environment()
    try:
        check_versions()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first, helps = os.environ.get("RANK", "0") == "0", {"--help", "-h", "--help_all"} & set(argv)
    if first and not helps:
        print("loading PyTorch, transformers and DeepSpeed ...", flush=True)
    _quieten()
    import ldistill.tiny.suite  # noqa: F401 - --eval_suite tiny
    from ldistill.common.errors import exit_code, worker_died
    from ldistill.recipe import DEFAULT_RECIPE, parse, print_help
    from ldistill.training.launch import check_launch, tell
    from ldistill.training.run import run
    from ldistill.training.stopping import STOPPED_EXIT_CODE, Stopped

    if helps:
        print_help(everything=helps == {"--help_all"})
        return 0
    try:
        check_launch()
        recipe = parse(argv)
        if first and not any(a.split("=")[0] == "--recipe" for a in argv):
            print(f"No --recipe was given: running the embedded default, '{DEFAULT_RECIPE}'.")
        run(recipe)
    except Stopped:
        return STOPPED_EXIT_CODE
    except (ValueError, OSError, FloatingPointError, RuntimeError) as raised:
        error = worker_died(raised) or raised
        if isinstance(error, RuntimeError) or os.environ.get("LDISTILL_DEBUG") == "1":
            raise
        tell(error)
        return exit_code(error)
    return 0


def _quieten() -> None:
    """Keep the libraries from talking over what a user should read."""
    import warnings

    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it must guess
    logging.disable_progress_bar()
    # Of names that DeepSpeed calls in PyTorch: at every step, from every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


if __name__ == "__main__":
    from ldistill.common.ranks import end_process

    end_process(main())
